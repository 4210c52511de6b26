"""Prepares ONNX Runtime and OpenVINO as engines of the model benchmark, with our exported ONNX graphs."""

import functools
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax import models
from evit_jax.benchmarks import report
from evit_jax.benchmarks.cases import NUM_INPUTS, BenchmarkCase, ModelCache
from evit_jax.benchmarks.workloads import Workload
from evit_jax.checkpoints.weights import by_name
from evit_jax.models.config import as_hw
from evit_jax.serving import onnx_artifact, runtimes
from evit_jax.serving.exported_function import apply_by_name

BFLOAT16 = 'bfloat16'  # ends the name of an engine that computes in bfloat16
_PAGE = 4096  # bytes


def engines(names: Sequence[str], precisions: Sequence[str]) -> list[str]:
    """Returns the engines of runtimes: each runtime in each requested precision that it has.

    Args:
      names: keys of `runtimes.PRECISIONS`.

    Raises:
      ValueError: a runtime or the package onnx is not installed, or no runtime has a requested precision.
    """
    for name in names:
        runtimes.check_installed(name, f'--against={name}')
    if not names:
        return []
    onnx_artifact.check_requirements(f'--against={names[0]}')
    for precision in precisions:
        if not any(precision in runtimes.PRECISIONS[name] for name in names):
            having = [name for name, precisions in runtimes.PRECISIONS.items() if precision in precisions]
            raise ValueError(f'--precision={precision}: no engine of --against computes in it on a CPU, '
                             f'{" and ".join(having) or "none"} would')
    return [name if precision == 'float32' else f'{name} {precision}' for name in names for precision in precisions
            if precision in runtimes.PRECISIONS[name]]


def is_runtime(engine: str) -> bool:
    """Returns True if an engine runs ONNX files."""
    return engine.partition(' ')[0] in runtimes.PRECISIONS


def check_workloads(names: Sequence[str], workloads: Sequence[Workload], platform: str) -> None:
    """Raises a ValueError if runtimes cannot be compared with our workloads."""
    if names and platform != 'cpu':
        raise ValueError(f'--against={names[0]} is measured on the CPU, and JAX computes on {platform}: set '
                         'JAX_PLATFORMS=cpu')
    if other := [workload for workload in workloads if names and workload.dtype != 'float32']:
        raise ValueError(f'--against={names[0]} runs ONNX files in float32, not {other[0]}: give --dtypes=float32. '
                         '--precision=bfloat16 lets OpenVINO compute in bfloat16')


class OnnxFiles:
    """The ONNX files of the benchmarked models, in a temporary folder. The batch size of a file is dynamic."""

    def __init__(self, cache: ModelCache):
        self._cache, self._folder = cache, tempfile.TemporaryDirectory()
        self.file = functools.cache(self._file)

    def _file(self, workload: Workload) -> pathlib.Path:
        """Writes the file of a workload. It maps normalised float32 images to logits."""
        from evit_jax.serving.jaxpr_to_onnx.convert import to_onnx
        from evit_jax.serving.jaxpr_to_onnx.graph import WeightFile
        params = jax.device_get(self._cache.params(workload.config, workload.run, workload.modules))
        config, params = models.fold_batchnorm(workload.config, params)
        apply = apply_by_name(config, workload.plan, modules=workload.modules, path=workload.run)

        def program(weights: dict[str, Any], images: jax.Array) -> dict[str, Any]:
            return {'logits': apply(weights, images)[0]}

        file = pathlib.Path(tempfile.mkdtemp(dir=self._folder.name)) / 'model.onnx'
        converted = to_onnx(program, by_name(params), (*as_hw(workload.image_size), 3), np.dtype(jnp.float32),
                            weight_file=WeightFile(file.with_name('weights.bin')), name=workload.model)
        file.write_bytes(converted.SerializeToString())
        return file


def onnx_case(workload: Workload, engine: str, cache: ModelCache, files: OnnxFiles) -> BenchmarkCase:
    """Opens the ONNX file of a workload, with the same weights and images as ours.

    The peak memory is the growth of the process's resident memory by the open file and its first call.
    """
    file = files.file(workload._replace(batch_size=1))
    images = cache.images(workload.image_size, workload.batch_size)
    name, _, precision = engine.partition(' ')
    before, begin = resident_bytes(), time.perf_counter()
    program = runtimes.open_program(file, name, precision=precision or 'float32', threads=report.num_cpus())
    seconds = time.perf_counter() - begin
    program(images[0])
    grown = None if before is None else max(resident_bytes() - before, 0)
    return BenchmarkCase(workload, engine, lambda number: program(images[number % NUM_INPUTS]), lambda outputs: outputs,
                         lambda outputs: outputs['logits'], seconds, workload.config.parameters(workload.plan),
                         peak_bytes=grown)


def resident_bytes() -> int | None:
    """Returns the resident memory of this process; None if the system does not report it."""
    file = pathlib.Path('/proc/self/statm')
    return int(file.read_text().split()[1]) * _PAGE if file.exists() else None
