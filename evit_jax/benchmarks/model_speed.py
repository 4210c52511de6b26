"""Measures models: compiles all cases, checks the logits of other engines, and times all cases interleaved."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.benchmarks import cases, onnx_cases, report, timing, torch_evit
from evit_jax.benchmarks.cases import JAX, BenchmarkCase
from evit_jax.benchmarks.timing import Times
from evit_jax.benchmarks.workloads import Workload
from evit_jax.reduction.reducers import EVIT
from evit_jax.serving import runtimes
from evit_jax.training.experiment import Experiment

AGAINST = 'torch', *runtimes.PRECISIONS  # engines to compare with

_TRAIN_MACS = 3  # MACs of a training step, as a multiple of the forward pass: the backward pass counts as two
# Limit on the relative difference from another engine's logits for the median image. The median is used because
# rounding may swap two tokens of nearly equal class attention in a few images. Rounding alone causes differences of up
# to 2e-6 in float32 and 0.03 in bfloat16.
_MAX_DIFFERENCE = {'float32': 1e-4, 'bfloat16': 0.1}


class Memory(NamedTuple):
    """Peak memory of a call: weights, input, output and temporaries."""

    bytes: int
    source: str  # 'device': measured by the device; 'compiler': its analysis; 'process': growth of resident memory


def measure(workloads: Sequence[Workload], *, rounds: int, seconds: float, against: Sequence[str] = (),
            precisions: Sequence[str] = ('float32',),
            setup_run: Callable[[Workload], Experiment] | None = None) -> dict[str, Any]:
    """Compiles and times workloads.

    Args:
      rounds: number of rounds. Every case has one turn per round.
      seconds: approximate total time of all turns.
      against: other engines whose forward pass is measured, too: names of `AGAINST`.
      precisions: precisions of ONNX runtimes; see `runtimes.PRECISIONS`.
      setup_run: function that sets up the run of a training workload on one device.

    Returns:
      The measurement as a dict for JSON. Its `rows` holds one dict for each workload and engine.

    Raises:
      ValueError: an engine is not available, or its logits differ from ours.
    """
    device = cases.device()
    metadata = {'device': device.device_kind, 'platform': device.platform, 'rounds': rounds}
    if device.platform == 'cpu':
        metadata['threads'] = report.num_cpus()  # XLA uses one thread per CPU
    names = [name for name in against if name != 'torch']
    onnx_cases.check_workloads(names, workloads, device.platform)
    engines = onnx_cases.engines(names, precisions)
    metadata['runtimes'] = {name: runtimes.check_installed(name) for name in names}
    if 'torch' in against:
        engines = [*torch_evit.ENGINES, *engines]
        compiled = sum(not workload.train for workload in workloads)
        metadata['torch'] = torch_evit.configure(device.platform, threads=report.num_cpus(), programs=compiled)
    ready, memories = _prepare(workloads, engines, setup_run)
    dtypes = list(dict.fromkeys(workload.dtype for workload in workloads))
    matmuls, flops = zip(*[cases.matmul_benchmark(dtype) for dtype in dtypes])
    times = timing.interleave([case.benchmark(rounds) for case in ready] + [*matmuls], rounds=rounds, seconds=seconds)
    matmul_times = dict(zip(dtypes, zip(times[len(ready):], flops)))
    metadata['matmul_flops_per_second'] = {dtype: flops / taken.median
                                           for dtype, (taken, flops) in matmul_times.items()}
    return metadata | {'rows': _rows(ready, memories, times, matmul_times)}


def _prepare(workloads, engines, setup_run) -> tuple[list[BenchmarkCase], dict[Workload, Memory]]:
    """Compiles and runs every case, and checks the logits of other engines against ours."""
    cache, begin, ready = cases.ModelCache(), time.perf_counter(), []
    files = onnx_cases.OnnxFiles(cache)
    total = sum(1 + len(_engines_of(workload, engines)) for workload in workloads)

    def add(case):
        ready.append(case)
        left = (time.perf_counter() - begin) / len(ready) * (total - len(ready))
        compiled = '' if case.compile_seconds is None else f', compiled in {case.compile_seconds:.1f} s'
        logging.info('%d of %d ready: %s, %s%s; about %.0f s to go before the first round', len(ready), total,
                     case.engine, case.workload, compiled, left)

    for workload in workloads:
        add(cases.training_case(workload, setup_run(workload)) if workload.train else
            cases.inference_case(workload, cache))
    ours = list(ready)
    # A device reports only the highest peak so far, so cases run in the order of their memory.
    memories = {case.workload: measure_memory(case) for case in sorted(ours, key=lambda case: case.peak_bytes)}
    for case in ours:
        for engine in _engines_of(case.workload, engines):
            other = (onnx_cases.onnx_case(case.workload, engine, cache, files) if onnx_cases.is_runtime(engine)
                     else cases.baseline_case(case.workload, engine, cache))
            check_logits(case, other)
            add(other)
    return ready, memories


def _engines_of(workload, engines) -> list[str]:
    """Returns the engines that run a workload: none a training step, PyTorch only EViT."""
    return [engine for engine in engines if not workload.train
            and (onnx_cases.is_runtime(engine) or workload.reducer == EVIT)]


def measure_memory(case: BenchmarkCase) -> Memory:
    """Runs a case and returns its peak memory. The device reports it if the run sets a new peak, else the compiler."""
    before = cases.device().memory_stats()
    case.wait(case.call(0))
    after = cases.device().memory_stats()
    if before and after and after['peak_bytes_in_use'] > before['peak_bytes_in_use']:
        return Memory(after['peak_bytes_in_use'] - before['bytes_in_use'] + case.argument_bytes, 'device')
    return Memory(case.peak_bytes, 'compiler')


def check_logits(ours: BenchmarkCase, other: BenchmarkCase) -> None:
    """Raises a ValueError if two cases return different logits for the same images."""
    differences = []
    for number in range(cases.NUM_INPUTS):
        want, got = (case.fetch(case.call(number)) for case in (ours, other))
        differences += (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).tolist()
    # GPUs and TPUs round float32 products about as coarsely as bfloat16.
    is_exact = cases.device().platform == 'cpu' and not other.engine.endswith(onnx_cases.BFLOAT16)
    limit = _MAX_DIFFERENCE[ours.workload.dtype if is_exact else 'bfloat16']
    if not (difference := float(np.median(differences))) <= limit:
        raise ValueError(f'{ours.workload}: the logits of {other.engine} differ from ours by {difference:.2g} '
                         f'(relative, median of {len(differences)} images), more than {limit:g}: the two are not the '
                         'same model, and their speeds are not compared')


def _rows(ready, memories, times, matmul_times) -> list[dict[str, Any]]:
    by_case = {(case.workload, case.engine): taken for case, taken in zip(ready, times)}
    return [_row(case, by_case, memories, *matmul_times[case.workload.dtype]) for case in ready]


def _row(case: BenchmarkCase, by_case: dict[tuple[Workload, str], Times], memories: dict[Workload, Memory],
         matmul: Times, matmul_flops: float) -> dict[str, Any]:
    """Returns the results of one case. None marks values that do not apply."""
    workload, engine = case.workload, case.engine
    times, dense, ours = by_case[workload, engine], by_case.get((workload.dense, engine)), by_case[workload, JAX]
    is_runtime = onnx_cases.is_runtime(engine)
    memory = memories[workload] if engine == JAX else Memory(case.peak_bytes, 'process' if is_runtime else None)
    executed = None if workload.train else workload.executed_macs if engine == JAX or is_runtime else workload.macs
    flops = 2 * workload.batch_size * (executed or _TRAIN_MACS * workload.macs)
    plan, single = workload.plan, workload.batch_size == 1
    return {
        'case': str(workload), 'engine': engine, 'step': 'train' if workload.train else 'inference',
        'model': workload.model, 'run': workload.run or None, 'reducer': str(workload.reducer),
        'rate': None if workload.r or workload.tokens else workload.rate, 'r': workload.r, 'fused': workload.fused,
        'gather_impl': workload.gather_impl or None, 'plan': str(plan), 'reduce_at': list(plan.reductions),
        'tokens': list(plan.tokens), 'drop': list(plan.dropped), 'image_size': workload.image_size,
        'batch_size': workload.batch_size, 'dtype': workload.dtype, 'parameters': case.parameters,
        'macs': workload.macs, 'executed_macs': executed, 'compile_seconds': case.compile_seconds,
        'memory_bytes': memory.bytes, 'memory_from': memory.source,
        'images_per_second': workload.batch_size / times.median,
        'latency_p50_ms': 1e3 * times.percentile(50) if single else None,
        'latency_p95_ms': 1e3 * times.percentile(95) if single else None,
        'macs_dense_over_this': workload.dense.macs / workload.macs,
        'speedup_over_dense': times.faster_than(dense) if dense else None,
        'share_of_matmul': flops / matmul_flops * times.faster_than(matmul),
        'ours_over_this': ours.faster_than(times), 'calls_timed': len(times.calls) or None,
        'seconds_per_call': times.turns}
