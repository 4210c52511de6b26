"""The manifest of an exported model: its plans, preprocessing, versions, and the checksums of its files."""

import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from evit_jax.checkpoints.loaded import CUSTOM, LoadedModel
from evit_jax.data.names import in_one_line, valid_text
from evit_jax.models.config import as_hw
from evit_jax.reduction.plan import TokenPlan, make_plan

FILE = 'manifest.json'


def model_name(trained: LoadedModel) -> str:
    """Returns the name of a model; the name of its file or folder if the architecture has no name."""
    if trained.name != CUSTOM or not trained.path:
        return trained.name
    return in_one_line(pathlib.PurePath(trained.path).stem)


def plan_of_training(trained: LoadedModel) -> TokenPlan | None:
    """Returns the plan of training; None if the reducer of the model does not support it."""
    try:
        return trained.plan()
    except ValueError:
        return None


def default_plan(trained: LoadedModel, plans: Mapping[str, TokenPlan]) -> str:
    """Returns the name of the default plan: the plan of training if it is among the plans, else the first one."""
    training_plan = plan_of_training(trained)
    return next((name for name, plan in plans.items() if plan == training_plan), next(iter(plans)))


def plan_entry(trained: LoadedModel, plan: TokenPlan) -> dict[str, Any]:
    """Returns the entry of a plan, without the file of its program."""
    macs = trained.config.macs(plan)
    dense = trained.config.macs(make_plan(plan.patches, trained.config.depth, reduce_at=()))
    return {'patches': plan.patches, 'reducer': str(plan.reducer), 'reductions': list(plan.reductions),
            'fused': plan.fused, 'tokens': [plan.counts[block] for block in plan.reductions],
            'drop': list(plan.dropped), 'macs': macs, 'macs_of_dense': macs / dense,
            'trained': plan == plan_of_training(trained)}


def entries(trained: LoadedModel, *, weights: str, kept: bool, ema: bool, packages: Iterable[str]) -> dict[str, Any]:
    """Returns the entries that every format has.

    Args:
      weights: name of the file of the weights.
      kept: True if the programs return `KEPT_OUTPUTS`.
      ema: True if the weights are the moving average.
      packages: names of packages whose versions are recorded.
    """
    config = trained.config
    return {
        'model': {'name': model_name(trained), 'parameters': config.parameters(),
                  'classes': config.classes if config.has_classes else 0, 'patch_size': config.patch_size,
                  'dtype': trained.dtype},
        'checkpoint': {'path': valid_text(trained.path), 'step': trained.step,
                       'weights': 'moving average' if ema else 'trained'},
        'image': {'size': list(as_hw(trained.image_size)), 'crop': trained.eval_crop,
                  'interpolation': trained.interpolation, 'mean': list(trained.mean), 'std': list(trained.std),
                  'normalised': 'inside the programs'},
        'weights': weights, 'kept': kept, 'versions': {name: importlib.metadata.version(name) for name in packages},
        'class_names': list(map(valid_text, trained.class_names))}


def write(folder: pathlib.Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of a complete folder, with the size and the SHA-256 of each file in the folder."""
    manifest = manifest | {'files': {file.name: {'bytes': file.stat().st_size, 'sha256': _sha256(file)}
                                     for file in sorted(folder.iterdir())}}
    manifest['class_names'] = manifest.pop('class_names')  # last, because the list may be long
    (folder / FILE).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def read(folder: pathlib.Path) -> dict[str, Any]:
    """Reads a manifest, and compares every file of the folder with its checksum.

    Raises:
      ValueError: the manifest or a file is missing or damaged.
    """
    way_out = 'copy the folder again, or export the model again'
    try:
        manifest = json.loads((folder / FILE).read_text(encoding='utf-8'))
        files = {name: (entry['bytes'], entry['sha256']) for name, entry in manifest['files'].items()}
    except FileNotFoundError as error:
        raise ValueError(f'{folder} is no exported model (it holds no {FILE}): give the folder of an export') from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{folder / FILE} is damaged ({type(error).__name__}: {error}): {way_out}') from error
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f'{file} is missing: {way_out}')
        if file.stat().st_size != size or _sha256(file) != digest:
            raise ValueError(f'{file} is damaged (its checksum differs from that of the manifest): {way_out}')
    return manifest


def _sha256(file):
    with open(file, 'rb') as content:
        return hashlib.file_digest(content, 'sha256').hexdigest()
