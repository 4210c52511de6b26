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

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.weights import by_name, fitted
from evit_jax.data.names import FileNames
from evit_jax.inference.model import VisionModel
from evit_jax.models.config import ViTConfig, as_hw
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.serving import loader
from evit_jax.serving import manifest as manifests
from evit_jax.serving.readme import readme
from evit_jax.training import step

PLATFORMS = ('cpu', 'cuda', 'rocm', 'tpu')
# dtype -> largest allowed difference of a probability between two compilations of one program
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
        plan_entries[name] = manifests.plan_entry(trained, plan) | {'file': file.name}
        logging.info('%s: %s, %.3g G MACs; %.2f MB, %.1f s', file.name, plan, plan_entries[name]['macs'] / 1e9,
                     file.stat().st_size / 1e6, time.monotonic() - start)
    (folder / _LOADER).write_text(inspect.getsource(loader), encoding='utf-8')
    manifest = {'default': manifests.default_plan(trained, plans), 'tolerance': TOLERANCE[trained.dtype],
                'platforms': list(platforms), 'plans': plan_entries} | manifests.entries(
        trained, weights=_WEIGHTS, kept=kept, ema=ema, packages=_PACKAGES)
    manifest['versions']['calling_convention'] = exported.calling_convention_version
    (folder / _README).write_text(readme(manifest, inspect.getsource(loader)), encoding='utf-8')
    manifests.write(folder, manifest)


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


def apply_by_name(config: ViTConfig, plan: TokenPlan, *, dtype: str = 'float32', modules: Modules = NO_MODULES,
                  path: str = '') -> Callable[..., tuple[jax.Array, dict[str, Any]]]:
    """Returns the function (weights by name, normalised images) -> (logits, outputs) of a model under a plan.

    Args:
      dtype: compute dtype.
      modules: learned modules of the reducer.
      path: origin of the weights, for error messages.
    """
    model = models.create(config, dtype=jnp.dtype(dtype), modules=modules)
    like = jax.eval_shape(model.init, jax.random.key(0))
    return lambda weights, images: model.apply(fitted(weights, like, path), images, plan)


def _program(trained: LoadedModel, plan: TokenPlan, kept: bool) -> Callable[..., dict[str, Any]]:
    apply = apply_by_name(trained.config, plan, dtype=trained.dtype, modules=trained.modules, path=trained.path)

    def program(weights: dict[str, jax.Array], images: jax.Array) -> dict[str, Any]:
        logits, outputs = apply(weights, step.normalise(images, trained.mean, trained.std))
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
