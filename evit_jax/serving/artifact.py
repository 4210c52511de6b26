"""Exports a trained model to a folder that can be served without this package, and checks the exported programs."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.weights import by_name, fitted
from evit_jax.data.names import FileNames, valid_text
from evit_jax.inference.model import VisionModel
from evit_jax.models.config import as_hw
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.serving import loader
from evit_jax.serving.readme import readme
from evit_jax.training import step

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# dtype -> largest allowed difference of a probability between two compilations of one program
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}

_WEIGHTS, _MANIFEST, _LOADER, _README = 'weights.npz', 'manifest.json', 'serve.py', 'README.md'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'Pillow')


def write(folder: pathlib.Path, trained: LoadedModel, plans: Mapping[str, TokenPlan], *, platforms: Sequence[str],
          kept: bool, ema: bool = False) -> None:
    """Writes a model to an empty folder: a program for each plan, the weights, a manifest, a loader and a README.

    Batch normalisation is folded into the convolutions; see `models.fold_batchnorm`.

    Args:
      folder: an empty folder.
      trained: the model.
      plans: name -> token plan. `default_plan` chooses the default.
      platforms: a subset of `PLATFORMS`. Each program runs on all of them.
      kept: if True, the programs also return the indices of the patches that each reduction keeps.
      ema: if True, the manifest records that the weights are the moving average.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
      ValueError: a platform is unknown, or the model has no classes.
    """
    if isinstance(platforms, str) or {*platforms} - {*PLATFORMS}:
        raise ValueError(f'platforms={platforms!r}: give a sequence of {", ".join(PLATFORMS)}')
    trained.check_has_classes()
    trained = trained.fold_batchnorm()
    weights = by_name(trained.params)
    np.savez(folder / _WEIGHTS, **weights)
    logging.info('%s: %.2f M parameters, %.1f MB', _WEIGHTS, sum(leaf.size for leaf in weights.values()) / 1e6,
                 (folder / _WEIGHTS).stat().st_size / 1e6)
    plan_entries, file_names = {}, FileNames(folder)
    for name, plan in plans.items():
        start, file = time.monotonic(), folder / file_names.of(f'plan_{name}.jaxexport', '.jaxexport')
        exported = export(trained, plan, platforms=platforms, kept=kept)
        file.write_bytes(exported.serialize())
        plan_entries[name] = _plan_entry(trained, plan) | {'trained': plan == plan_of_training(trained),
                                                           'file': file.name}
        logging.info('%s: %s, %.3g G MACs; %.2f MB, %.1f s', file.name, plan, plan_entries[name]['macs'] / 1e9,
                     file.stat().st_size / 1e6, time.monotonic() - start)
    (folder / _LOADER).write_text(inspect.getsource(loader), encoding='utf-8')
    manifest = {'default': default_plan(trained, plans), 'tolerance': TOLERANCE[trained.dtype]} | _manifest(
        trained, plan_entries, platforms, kept, ema, exported.calling_convention_version)
    (folder / _README).write_text(readme(manifest, inspect.getsource(loader)), encoding='utf-8')
    manifest['files'] = {file.name: {'bytes': file.stat().st_size, 'sha256': _sha256(file)}
                         for file in sorted(folder.iterdir())}
    manifest['class_names'] = manifest.pop('class_names')  # last, because the list may be long
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')


def default_plan(trained: LoadedModel, plans: Mapping[str, TokenPlan]) -> str:
    """Returns the name of the default plan: the plan of training if it is among the plans, else the first one."""
    training_plan = plan_of_training(trained)
    return next((name for name, plan in plans.items() if plan == training_plan), next(iter(plans)))


def export(trained: LoadedModel, plan: TokenPlan, *, platforms: Sequence[str], kept: bool) -> jax.export.Exported:
    """Exports the program of one plan. It maps (weights by name, images) to probabilities, and optionally kept patches.

    Images are uint8 [b, H, W, 3], probabilities float32 [b, L]. The batch size b is symbolic. The weights are an
    argument, so that all programs can share one file of weights.
    """
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in by_name(trained.params).items()}
    batch, = jax.export.symbolic_shape('b')
    images = jax.ShapeDtypeStruct((batch, *as_hw(trained.image_size), 3), jnp.uint8)
    # JAX makes no compatibility promise for LayoutConstraint, but it makes token reductions 6 % faster on a TPU.
    layout = jax.export.DisabledSafetyCheck.custom_call('LayoutConstraint')
    with _without_source_locations():
        return jax.export.export(jax.jit(_program(trained, plan, kept)), platforms=platforms,
                                 disabled_checks=[layout])(shapes, images)


def check(folder: pathlib.Path, trained: LoadedModel, plans: Mapping[str, TokenPlan]) -> Iterator[tuple[str, float]]:
    """Compares the probabilities of the exported programs with those of the model, on one random image.

    Yields:
      Name of each plan, and the largest absolute difference between the probabilities.

    Raises:
      ValueError: a difference is larger than `TOLERANCE`, or the model's logits are not finite.
    """
    served, model = loader.Served(folder), VisionModel(trained, batch_size=1)
    image = np.random.default_rng(0).integers(0, 256, (*as_hw(trained.image_size), 3), np.uint8)
    for name, plan in plans.items():
        prediction, = model.with_plan(plan=plan).predict(image)
        if prediction.problem:
            raise ValueError(f'plan {name} cannot be checked ({prediction.problem}): the export is discarded')
        want = np.asarray(jax.nn.softmax(prediction.logits))
        got, = np.asarray(served(prediction.image[None], name)['probabilities'])
        difference, tolerance = float(np.abs(got - want).max()), TOLERANCE[trained.dtype]
        if not difference <= tolerance:
            raise ValueError(f"the probabilities of plan {name} differ from the model's by up to {difference:.1e}, and "
                             f'rounding explains {tolerance:.0e}: the export is discarded')
        yield name, difference


def _program(trained: LoadedModel, plan: TokenPlan, kept: bool) -> Callable[..., dict[str, Any]]:
    model = models.create(trained.config, dtype=jnp.dtype(trained.dtype), modules=trained.modules)
    like = jax.eval_shape(model.init, jax.random.key(0))

    def program(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, Any]:
        images = step.normalise(images, trained.mean, trained.std)
        logits, outputs = model.apply(fitted(weights, like, trained.path), images, plan)
        return {'probabilities': jax.nn.softmax(logits)} | ({'kept': outputs['kept']} if kept else {})

    return program


@contextlib.contextmanager
def _without_source_locations():
    """Omits callers and folders from the source locations in a program, so that exports are reproducible."""
    settings = {'jax_hlo_source_file_canonicalization_regex': '.*/', 'jax_include_full_tracebacks_in_locations': False}
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _manifest(trained, plans, platforms, kept, ema, convention):
    config = trained.config
    return {
        'model': {'name': trained.name, 'parameters': config.parameters(), 'classes': config.classes,
                  'patch_size': config.patch_size, 'dtype': trained.dtype},
        'checkpoint': {'path': valid_text(trained.path), 'step': trained.step,
                       'weights': 'moving average' if ema else 'trained'},
        'image': {'size': list(as_hw(trained.image_size)), 'crop': trained.eval_crop,
                  'interpolation': trained.interpolation, 'mean': list(trained.mean), 'std': list(trained.std),
                  'normalised': 'inside the programs'},
        'weights': _WEIGHTS, 'plans': plans, 'platforms': list(platforms), 'kept': kept,
        'versions': {name: importlib.metadata.version(name) for name in _PACKAGES} | {'calling_convention': convention},
        'class_names': list(map(valid_text, trained.class_names))}


def plan_of_training(trained: LoadedModel) -> TokenPlan | None:
    """Returns the plan of training; None if the reducer of the model does not support it."""
    try:
        return trained.plan()
    except ValueError:
        return None


def _plan_entry(trained, plan):
    macs = trained.config.macs(plan)
    dense = trained.config.macs(make_plan(plan.patches, trained.config.depth, reduce_at=()))
    return {'patches': plan.patches, 'reducer': str(plan.reducer), 'reductions': list(plan.reductions),
            'fused': plan.fused, 'tokens': [plan.counts[block] for block in plan.reductions],
            'drop': list(plan.dropped), 'macs': macs, 'macs_of_dense': macs / dense}


def _sha256(file):
    with open(file, 'rb') as content:
        return hashlib.file_digest(content, 'sha256').hexdigest()
