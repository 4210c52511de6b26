"""Engines of the server: each computes the plans of a model by name, with JAX, ONNX Runtime or OpenVINO."""

import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.inference.model import VisionModel
from evit_jax.interchange.opening import open_model
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.serving import loader, onnx_artifact, runtimes
from evit_jax.serving import manifest as manifests
from evit_jax.serving.exported_function import KEPT_OUTPUTS
from evit_jax.serving.served_model import ServedModel, plans_of

JAX = 'jax'
ENGINES = (JAX, *runtimes.PRECISIONS)


class Outputs(NamedTuple):
    """The outputs for B images of P patches, as numpy arrays. All but `logits` are empty if the programs lack them."""

    logits: np.ndarray                             # [B, L] float32; the features if the model has no classes
    kept: tuple[np.ndarray, ...] = ()              # per reduction, [B, K] int32: see `inference.compiled.ModelOutput`
    token_of_patch: tuple[np.ndarray, ...] = ()    # per reduction, [B, P] int32
    class_attention: tuple[np.ndarray, ...] = ()   # per reduction, [B, N] float32

    def row(self, index: int) -> 'Outputs':
        """Returns the outputs of one image, without the batch axis."""
        return Outputs(self.logits[index], *(tuple(array[index] for array in arrays) for arrays in self[1:]))


Engine = Callable[[str, np.ndarray], Outputs]
"""(name of a plan, images uint8 [B, H, W, 3]) -> outputs."""


class EngineOptions(NamedTuple):
    """The choice of an engine and of the plans that it computes."""

    engine: str = JAX                             # one of `ENGINES`
    precision: str = 'float32'                    # precision of ONNX Runtime and OpenVINO
    rates: Sequence[float] | None = None          # keep rates; see `served_model.plans_of`
    reducers: Sequence[str] = ()                  # reducers besides that of the model
    plan_files: Mapping[str, PlanFile] | None = None  # name -> plan file
    ema: bool = False                             # use the moving average of the weights

    def check(self) -> None:
        """Raises a ValueError if the engine is unknown, not installed, or lacks the precision."""
        if self.engine not in ENGINES:
            raise ValueError(f'--engine={self.engine} is unknown, there are {", ".join(ENGINES)}')
        precisions = ('float32',) if self.engine == JAX else runtimes.PRECISIONS[self.engine]
        if self.engine != JAX:
            runtimes.check_installed(self.engine, f'--engine={self.engine}')
        if self.precision not in precisions:
            raise ValueError(f'--precision={self.precision} is for --engine=openvino: --engine={self.engine} computes '
                             f'in {"the dtype of the model" if self.engine == JAX else "float32"}')


def open_served(path: str, options: EngineOptions) -> tuple[ServedModel, Engine]:
    """Opens a model for serving. Nothing is compiled yet, except that ONNX engines write and check their files.

    Args:
      path: folder of an export; or a run, a file or folder of weights, or a Hub name.

    Raises:
      ValueError: the options do not fit the path, a plan does not fit the model, or a file is missing or damaged.
      FileNotFoundError: the path does not exist.
    """
    options.check()
    folder = pathlib.Path(path).expanduser()
    if (folder / manifests.FILE).is_file():
        return _open_exported(folder, options)
    if options.engine != JAX:
        onnx_artifact.check_requirements(f'--engine={options.engine} for a model that is not exported')
    loaded = open_model(path, ema=options.ema)
    plans = plans_of(loaded, rates=options.rates, reducers=options.reducers, files=options.plan_files)
    if options.engine == JAX:
        return ServedModel.of_loaded(loaded, plans, JAX), JaxEngine(loaded, plans)
    temporary = tempfile.TemporaryDirectory(prefix='evit_serve_')
    logging.info('%s is exported to %s for %s; the folder is deleted at the end', path, temporary.name, options.engine)
    exported = pathlib.Path(temporary.name)
    onnx_artifact.write(exported, onnx_artifact.with_dtype(loaded, None), plans, kept=True, ema=options.ema)
    manifest = manifests.read(exported)
    return (ServedModel.of_manifest(manifest, path, options.engine),
            OnnxEngine(exported, manifest, options, temporary))


def _open_exported(folder, options):
    """Opens the folder of an export. Its programs fix the plans, and its format the engine."""
    if options.rates is not None or options.reducers or options.plan_files or options.ema:
        raise ValueError(f'{folder} is an export, whose plans and weights are fixed: leave out --rates, --reducers, '
                         '--plan and --ema, or serve the checkpoint')
    manifest = manifests.read(folder)
    is_onnx = manifest.get('format') == 'onnx'
    if is_onnx == (options.engine == JAX):
        fitting = ' or '.join(f'--engine={name}' for name in ENGINES if (name == JAX) != is_onnx)
        raise ValueError(f'{folder} holds {"ONNX" if is_onnx else "StableHLO"} programs, which --engine='
                         f'{options.engine} does not run: give {fitting}')
    served = ServedModel.of_manifest(manifest, str(folder), options.engine)
    return served, OnnxEngine(folder, manifest, options) if is_onnx else StableHloEngine(folder)


class JaxEngine:
    """Computes a model in memory. A program is compiled at the first call for a plan and batch size."""

    def __init__(self, loaded: LoadedModel, plans: Mapping[str, TokenPlan]):
        self._model, self._plans = VisionModel(loaded), plans

    def __call__(self, plan: str, images: np.ndarray) -> Outputs:
        outputs = self._model.compiled(len(images)).run('predict', images, self._plans[plan])
        outputs = jax.tree.map(np.asarray, outputs)
        return Outputs(outputs['logits'], *(outputs[name] for name in Outputs._fields[1:]))


class StableHloEngine:
    """Computes a StableHLO export. For a model with classes, its logits are the logarithms of the probabilities.

    Raises:
      ValueError: a file is damaged, or another version of jax wrote it.
    """

    def __init__(self, folder: pathlib.Path):
        try:
            self._served = loader.Served(folder)
        except RuntimeError as error:
            raise ValueError(str(error)) from error

    def __call__(self, plan: str, images: np.ndarray) -> Outputs:
        outputs = jax.tree.map(np.asarray, self._served(images, plan))
        result = outputs[self._served.manifest['outputs'][0]]
        if 'probabilities' in outputs:
            result = np.log(np.maximum(result, np.finfo(np.float32).tiny))
        return Outputs(result, *(tuple(outputs.get(name, ())) for name in KEPT_OUTPUTS))


class OnnxEngine:
    """Computes an ONNX export with a runtime.

    Args:
      temporary: temporary folder of the export, which is kept until this engine is deleted.
    """

    def __init__(self, folder: pathlib.Path, manifest: Mapping[str, Any], options: EngineOptions,
                 temporary: Any = None):
        self._dtype, self._temporary = np.dtype(manifest['input']['dtype']), temporary
        self._result = manifest['outputs'][0]
        self._programs = {
            name: runtimes.open_program(folder / entry['file'], options.engine, precision=options.precision)
            for name, entry in manifest['plans'].items()}

    def __call__(self, plan: str, images: np.ndarray) -> Outputs:
        outputs = self._programs[plan](images.astype(self._dtype, copy=False))
        return Outputs(outputs[self._result], *(_by_stage(outputs, name) for name in KEPT_OUTPUTS))


def _by_stage(outputs, name):
    """Returns the arrays `name_0`, `name_1`, ... of a program."""
    names = [f'{name}_{stage}' for stage in range(len(outputs)) if f'{name}_{stage}' in outputs]
    return tuple(outputs[each] for each in names)
