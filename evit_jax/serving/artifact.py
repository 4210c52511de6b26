"""Exports a trained model to a folder that can be served without this package, and checks the exported programs."""

import contextlib
import inspect
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.weights import by_name
from evit_jax.data.names import FileNames
from evit_jax.inference.model import VisionModel
from evit_jax.inference.prediction import NOT_FINITE
from evit_jax.models.config import as_hw
from evit_jax.reduction.plan import TokenPlan
from evit_jax.serving import loader
from evit_jax.serving import manifest as manifests
from evit_jax.serving.exported_function import KEPT_OUTPUTS, exported_function
from evit_jax.serving.readme import readme

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
OUTPUTS = ('probabilities', 'embedding', 'features', *KEPT_OUTPUTS)  # names of outputs; the first is the result
# dtype -> largest allowed difference of an output between two compilations of one program, as a multiple of the
# largest output (at least 1)
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}

_WEIGHTS, _LOADER, _README = 'weights.npz', 'serve.py', 'README.md'
_PACKAGES = ('jax', 'jaxlib', 'flax', 'numpy', 'Pillow')


def write(folder: pathlib.Path, trained: LoadedModel, plans: Mapping[str, TokenPlan], *, platforms: Sequence[str],
          kept: bool, ema: bool = False) -> None:
    """Writes a model to an empty folder: a program for each plan, the weights, a manifest, a loader and a README.

    Batch normalisation is folded into the convolutions; see `models.fold_batchnorm`.

    Args:
      folder: an empty folder.
      trained: the model.
      plans: name -> token plan. `manifest.default_plan` chooses the default.
      platforms: a subset of `PLATFORMS`. Each program runs on all of them.
      kept: if True, the programs also return the kept patches, `token_of_patch` and the class attention of each
        reduction.
      ema: if True, the manifest records that the weights are the moving average.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
      ValueError: a platform is unknown.
    """
    if isinstance(platforms, str) or {*platforms} - {*PLATFORMS}:
        raise ValueError(f'platforms={platforms!r}: give a sequence of {", ".join(PLATFORMS)}')
    trained = trained.fold_batchnorm()
    weights = by_name(trained.params)
    np.savez(folder / _WEIGHTS, **weights)
    logging.info('%s: %.2f M parameters, %.1f MB', _WEIGHTS, sum(leaf.size for leaf in weights.values()) / 1e6,
                 (folder / _WEIGHTS).stat().st_size / 1e6)
    plan_entries, outputs, file_names = {}, {}, FileNames(folder)  # outputs: names; a dense plan has fewer
    for name, plan in plans.items():
        start, file = time.monotonic(), folder / file_names.of(f'plan_{name}.jaxexport', '.jaxexport')
        exported = export(trained, plan, platforms=platforms, kept=kept)
        file.write_bytes(exported.serialize())
        outputs |= dict.fromkeys(jax.tree.unflatten(exported.out_tree, exported.out_avals))
        plan_entries[name] = manifests.plan_entry(trained, plan) | {'file': file.name}
        logging.info('%s: %s, %.3g G MACs; %.2f MB, %.1f s', file.name, plan, plan_entries[name]['macs'] / 1e9,
                     file.stat().st_size / 1e6, time.monotonic() - start)
    (folder / _LOADER).write_text(inspect.getsource(loader), encoding='utf-8')
    manifest = {'default': manifests.default_plan(trained, plans), 'tolerance': TOLERANCE[trained.dtype],
                'platforms': list(platforms), 'outputs': [name for name in OUTPUTS if name in outputs],
                'plans': plan_entries} | manifests.entries(
        trained, weights=_WEIGHTS, kept=kept, ema=ema, packages=_PACKAGES)
    manifest['versions']['calling_convention'] = exported.calling_convention_version
    (folder / _README).write_text(readme(manifest, inspect.getsource(loader)), encoding='utf-8')
    manifests.write(folder, manifest)


def export(trained: LoadedModel, plan: TokenPlan, *, platforms: Sequence[str], kept: bool) -> jax.export.Exported:
    """Exports the program of one plan. It maps (weights by name, images) to the outputs of `exported_function`.

    It returns probabilities instead of logits. Images are uint8 [b, H, W, 3]. The batch size b is symbolic. The weights
    are an argument, so that all programs can share one file of weights.
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
    """Compares the results of the exported programs with those of the model, on one random image.

    Yields:
      Name of each plan, and the largest difference of a probability; of a feature, as a multiple of the largest one.

    Raises:
      ValueError: a difference is larger than `TOLERANCE`, or the model's outputs are not finite.
    """
    served, model = loader.Served(folder), VisionModel(trained, batch_size=1)
    result = served.manifest['outputs'][0]
    image = np.random.default_rng(0).integers(0, 256, (1, *as_hw(trained.image_size), 3), np.uint8)
    for name, plan in plans.items():
        want = np.asarray(model.with_plan(plan=plan)(image))
        if not np.isfinite(want).all():
            raise ValueError(f'plan {name} cannot be checked ({NOT_FINITE}): the export is discarded')
        if trained.config.has_classes:
            want = np.asarray(jax.nn.softmax(want))
        got = np.asarray(served(image, name)[result])
        difference, tolerance = float(np.abs(got - want).max() / max(np.abs(want).max(), 1)), TOLERANCE[trained.dtype]
        if not difference <= tolerance:
            raise ValueError(f"the outputs of plan {name} differ from the model's by up to {difference:.1e}, and "
                             f'rounding explains {tolerance:.0e}: the export is discarded')
        yield name, difference


def _program(trained: LoadedModel, plan: TokenPlan, kept: bool) -> Callable[..., dict[str, Any]]:
    """Returns the function of the export, with probabilities instead of logits."""
    function = exported_function(trained, plan, kept)

    def program(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, Any]:
        outputs = function(weights, images)
        return {'probabilities': jax.nn.softmax(outputs.pop('logits'))} | outputs if 'logits' in outputs else outputs

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
