"""Exports a model to a folder of ONNX files, one for each plan, and checks them with ONNX Runtime."""

import importlib.util
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.weights import by_name
from evit_jax.data.names import FileNames
from evit_jax.models.config import as_hw
from evit_jax.reduction.plan import TokenPlan
from evit_jax.serving import manifest as manifests
from evit_jax.serving import runtimes
from evit_jax.serving.exported_function import KEPT_OUTPUTS, exported_function
from evit_jax.serving.onnx_readme import onnx_readme

# dtype -> largest allowed difference of a result, as a multiple of the largest one (at least 1)
TOLERANCE = {'float32': 1e-4, 'float16': 5e-2}
INPUT_DTYPES = ('uint8', 'float32')
WEIGHTS = 'weights.bin'
_CHECKER = 'onnxruntime'
_CHECK_BATCHES = 1, 3  # batch sizes of the check: the batch is dynamic
_MAX_INLINE = 2**31 - 2**26  # bytes of weights in a model without a file of weights; protobuf's limit is 2 GB


class Check(NamedTuple):
    """The comparison of an ONNX file with the model."""

    difference: float  # largest difference of a result; for float32, of the images with equal kept patches
    equal: int         # number of images for which all reductions keep the same patches
    images: int        # number of images


def check_requirements(flag: str = '--format=onnx') -> None:
    """Raises a ValueError if the package onnx, which a flag needs, is not installed."""
    if importlib.util.find_spec('onnx') is None:
        raise ValueError(f"{flag} needs the package onnx: pip install 'evit_jax[onnx]'")


def with_dtype(trained: LoadedModel, dtype: str | None) -> LoadedModel:
    """Returns the model with the compute dtype of the export. The default is float32.

    Raises:
      ValueError: ONNX files are not exported in this dtype.
    """
    if dtype is not None and dtype not in TOLERANCE:
        raise ValueError(f'--format=onnx --dtype={dtype}: give {" or ".join(TOLERANCE)}. A runtime converts float32 '
                         'to bfloat16 itself, as OpenVINO does')
    return trained._replace(dtype=dtype or 'float32')


def write(folder: pathlib.Path, trained: LoadedModel, plans: Mapping[str, TokenPlan], *, input_dtype: str = 'uint8',
          kept: bool = False, ema: bool = False) -> None:
    """Writes a model to an empty folder: an ONNX file for each plan, their weights, a manifest and a README.

    Batch normalisation is folded into the convolutions. If ONNX Runtime is installed, each file is compared with the
    model.

    Args:
      folder: an empty folder.
      trained: the model; its dtype is a key of `TOLERANCE`.
      plans: name -> token plan.
      input_dtype: one of `INPUT_DTYPES`; the values are 0 to 255 in both.
      kept: if True, the programs also return `KEPT_OUTPUTS`; the name of a reduction ends with its number: kept_0.
      ema: if True, the manifest records that the weights are the moving average.

    Raises:
      OSError: the disk is full, or the folder cannot be written.
      ValueError: a plan cannot be expressed in ONNX, or its outputs differ from the model's.
    """
    import onnx

    from evit_jax.serving.jaxpr_to_onnx.graph import OPSET, WeightFile
    trained = trained.fold_batchnorm()
    entries, checks, file_names, weights = {}, {}, FileNames(folder), WeightFile(folder / WEIGHTS)
    outputs = {}  # names; a plan without reductions has fewer
    for name, plan in plans.items():
        start, file = time.monotonic(), folder / file_names.of(f'plan_{name}.onnx', '.onnx')
        model = convert(trained, plan, input_dtype=input_dtype, kept=kept, weight_file=weights)
        file.write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(file), full_check=True)
        entries[name] = manifests.plan_entry(trained, plan) | {'file': file.name}
        logging.info('%s: %s, %.3g G MACs; %d nodes, %.2f MB, %.1f s', file.name, plan, entries[name]['macs'] / 1e9,
                     len(model.graph.node), file.stat().st_size / 1e6, time.monotonic() - start)
        outputs |= dict.fromkeys(output.name for output in model.graph.output)
        checks[name] = _logged_check(file, trained, plan, input_dtype, name)
    manifest = {'format': 'onnx', 'opset': OPSET, 'default': manifests.default_plan(trained, plans),
                'tolerance': TOLERANCE[trained.dtype], 'input': {'name': 'images', 'dtype': input_dtype},
                'outputs': [*outputs], 'plans': entries, 'checks': checks} | manifests.entries(
                    trained, weights=WEIGHTS, kept=kept, ema=ema, packages=('jax', 'onnx'))
    if any(checks.values()):
        manifest['versions'][_CHECKER] = runtimes.check_installed(_CHECKER)
    (folder / 'README.md').write_text(onnx_readme(manifest), encoding='utf-8')
    manifests.write(folder, manifest)


def convert(trained: LoadedModel, plan: TokenPlan, *, input_dtype: str, kept: bool, weight_file: Any = None) -> Any:
    """Converts the program of one plan to an `onnx.ModelProto`.

    Args:
      weight_file: the `WeightFile` that receives the weights; None: the model contains them.
    """
    from evit_jax.serving.jaxpr_to_onnx.convert import to_onnx
    return to_onnx(_program(trained, plan, kept), by_name(trained.params), (*as_hw(trained.image_size), 3),
                   np.dtype(input_dtype), weight_file=weight_file, name=trained.name)


def load(folder: pathlib.Path, plan: str | None = None, *, runtime: str = _CHECKER,
         threads: int | None = None) -> runtimes.Program:
    """Opens a plan of an exported folder; None: the default plan.

    Raises:
      ValueError: a file is missing or damaged, there is no such plan, or the runtime cannot read it.
    """
    runtimes.check_installed(runtime)
    manifest = manifests.read(pathlib.Path(folder))
    if manifest.get('format') != 'onnx':
        raise ValueError(f'{folder} is no ONNX export: export the model with --format=onnx')
    plan = manifest['default'] if plan is None else plan
    if plan not in manifest['plans']:
        raise ValueError(f'{folder} has no plan {plan!r}, it has {", ".join(manifest["plans"])}')
    return runtimes.open_program(pathlib.Path(folder) / manifest['plans'][plan]['file'], runtime, threads=threads)


def check(file: pathlib.Path, trained: LoadedModel, plan: TokenPlan, input_dtype: str) -> Check:
    """Compares the outputs of an ONNX file with those of the model in float32, on random images.

    Kept patches are compared as sets, by a second conversion that returns them.

    Raises:
      ValueError: the outputs differ by more than rounding explains.
    """
    program = runtimes.open_program(file, _CHECKER)
    with_kept = _kept_program(trained, plan, input_dtype)
    reference = jax.jit(_program(trained._replace(dtype='float32'), plan, kept=True))
    rng, weights, differences, equal = np.random.default_rng(0), by_name(trained.params), [], []
    for batch in _CHECK_BATCHES:
        images = rng.integers(0, 256, (batch, *as_hw(trained.image_size), 3)).astype(input_dtype)
        with jax.default_device(jax.devices('cpu')[0]):
            want = {name: np.asarray(array) for name, array in reference(weights, images).items()}
        got = program(images)
        output = next(iter(got))
        scale = np.maximum(np.abs(want[output]).max(axis=1), 1)
        differences += list(np.abs(got[output] - want[output]).max(axis=1) / scale)
        equal += list(_equal_sets(with_kept(images), want, batch))
    differences, equal, limit = np.array(differences), np.array(equal), TOLERANCE[trained.dtype]
    if trained.dtype == 'float32':
        if equal.mean() < 0.5:
            raise ValueError(f'{file.name} keeps other patches than the model for {(~equal).sum()} of {equal.size} '
                             'images: the export is discarded')
        compared = differences[equal]  # rounding may swap two tokens of nearly equal score, which is no error
    else:
        compared = np.median(differences, keepdims=True)
    if not (worst := float(compared.max())) <= limit:
        raise ValueError(f"the {output} of {file.name} differ from the model's by up to {worst:.1e} of the largest, "
                         f'and rounding explains {limit:.0e}: the export is discarded')
    return Check(worst, int(equal.sum()), equal.size)


def _logged_check(file, trained, plan, input_dtype, name):
    """Checks a file if ONNX Runtime is installed. Returns the entry of the manifest, or None."""
    if not runtimes.is_installed(_CHECKER):
        logging.warning("plan %s was not checked: it needs ONNX Runtime, pip install 'evit_jax[onnxruntime]'", name)
        return None
    result = check(file, trained, plan, input_dtype)
    logging.info("plan %s: run by ONNX Runtime, its outputs differ from the model's by %.1e at most; it keeps the same "
                 'patches in %d of %d images', name, result.difference, result.equal, result.images)
    return result._asdict()


def _kept_program(trained, plan, input_dtype):
    """Returns a program with the kept patches; without any if the plan keeps all or the model is too large."""
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(trained.params))
    if not plan.reductions or num_bytes > _MAX_INLINE:
        return lambda images: {}
    model = convert(trained, plan, input_dtype=input_dtype, kept=True)
    return runtimes.open_program(model.SerializeToString(), _CHECKER)


def _equal_sets(got, want, batch):
    """Returns for each image whether all reductions keep the same patches, bool [B]."""
    same = [(np.sort(got[name], axis=1) == np.sort(want[name], axis=1)).all(axis=1)
            for name in got if name.startswith('kept_')]
    return np.logical_and.reduce(same) if same else np.ones(batch, bool)


def _program(trained: LoadedModel, plan: TokenPlan, kept: bool) -> Callable[..., dict[str, jax.Array]]:
    """Returns the function of the export, with a separate output for each reduction: kept_0, kept_1, ..."""
    function = exported_function(trained, plan, kept)

    def program(weights, images):
        outputs = function(weights, images)
        stages = {f'{name}_{stage}': array for name in KEPT_OUTPUTS
                  for stage, array in enumerate(outputs.pop(name, ()))}
        return outputs | stages

    return program
