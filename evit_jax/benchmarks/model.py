"""How fast models are: cases compiled, held against PyTorch's on request, and all of them timed in turns."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.benchmarks import clock, report, subjects, torch_evit
from evit_jax.benchmarks.cases import Case
from evit_jax.benchmarks.clock import Times
from evit_jax.benchmarks.subjects import OURS, BenchmarkCase
from evit_jax.training.experiment import Experiment

_TRAIN_MACS = 3  # of a training step, in forward passes: the backward pass counts twice
# The difference from PyTorch's logits that is let pass, of half of the images: in a few, two tokens of nearly the same
# class attention may be ranked otherwise. Rounding makes up to 2e-6 and 0.03.
_LIMITS = {'float32': 1e-4, 'bfloat16': 0.1}


class Memory(NamedTuple):
    """Bytes at the peak of a call: weights, input, and what the program needs beside."""

    bytes: int
    source: str  # device: measured; compiler: its analysis


def measure(cases: Sequence[Case], *, rounds: int, seconds: float, against: bool = False,
            run_of: Callable[[Case], Experiment] | None = None) -> dict[str, Any]:
    """Compiles and times cases.

    Args:
      rounds: in each, every case has one turn.
      seconds: of all turns together, about.
      against: PyTorch as well, where a case does not train.
      run_of: the run of a case that trains, laid out on one device.

    Returns:
      What was measured, by name, for JSON: `rows` has a dict for each case and engine.

    Raises:
      ValueError: PyTorch is not to be had, or its logits are not ours.
    """
    device = subjects.device()
    metadata = {'device': device.device_kind, 'platform': device.platform, 'rounds': rounds}
    if device.platform == 'cpu':
        metadata['threads'] = report.cpus()  # what XLA takes
    if against:
        compiled = sum(not case.train for case in cases)
        metadata['torch'] = torch_evit.set_up(device.platform, threads=report.cpus(), programs=compiled)
    ready, memories = _prepare(cases, torch_evit.RIVALS if against else (), run_of)
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    products, flops = zip(*[subjects.product(dtype) for dtype in dtypes])
    times = clock.interleave([subject.contender(rounds) for subject in ready] + [*products], rounds=rounds,
                             seconds=seconds)
    matmul = dict(zip(dtypes, zip(times[len(ready):], flops)))
    metadata['matmul_flops_per_second'] = {dtype: of / taken.median for dtype, (taken, of) in matmul.items()}
    return metadata | {'rows': _rows(ready, memories, times, matmul)}


def _prepare(cases, rivals, run_of) -> tuple[list[BenchmarkCase], dict[Case, Memory]]:
    """Compiles all, runs each, and sees to it that PyTorch's results are ours."""
    stock, begin, ready = subjects.ModelCache(), time.perf_counter(), []
    total = sum(1 + len(rivals) * (not case.train) for case in cases)

    def add(subject):
        ready.append(subject)
        left = (time.perf_counter() - begin) / len(ready) * (total - len(ready))
        compiled = '' if subject.compile_seconds is None else f', compiled in {subject.compile_seconds:.1f} s'
        logging.info('%d of %d ready: %s, %s%s; about %.0f s to go before the first round', len(ready), total,
                     subject.engine, subject.case, compiled, left)

    for case in cases:
        add(subjects.training(case, run_of(case)) if case.train else subjects.inference(case, stock))
    ours = list(ready)
    # A device tells its highest peak so far: the one that needs least comes first.
    memories = {subject.case: _memory(subject) for subject in sorted(ours, key=lambda subject: subject.needed)}
    for subject in ours:
        for engine in rivals if not subject.case.train else ():
            other = subjects.baseline(subject.case, engine, stock)
            agree(subject, other)
            add(other)
    return ready, memories


def _memory(subject: BenchmarkCase) -> Memory:
    """Runs it; measures where the device can tell and the peak is the highest so far."""
    before = subjects.device().memory_stats()
    subject.wait(subject.call(0))
    after = subjects.device().memory_stats()
    if before and after and after['peak_bytes_in_use'] > before['peak_bytes_in_use']:
        return Memory(after['peak_bytes_in_use'] - before['bytes_in_use'] + subject.arguments, 'device')
    return Memory(subject.needed, 'compiler')


def agree(ours: BenchmarkCase, other: BenchmarkCase) -> None:
    """Raises a ValueError if two subjects give other logits for the same images."""
    differences = []
    for number in range(subjects.INPUTS):
        want, got = (subject.fetch(subject.call(number)) for subject in (ours, other))
        differences += (np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)).tolist()
    # Elsewhere than on a CPU, products of float32 are rounded much like those of bfloat16.
    limit = _LIMITS[ours.case.dtype if subjects.device().platform == 'cpu' else 'bfloat16']
    if not (found := float(np.median(differences))) <= limit:
        raise ValueError(f'{ours.case}: the logits of {other.engine} differ from ours by {found:.2g} (relative, median '
                         f'of {len(differences)} images), more than {limit:g}: the two are not the same model, and '
                         'their speeds are not compared')


def _rows(ready, memories, times, matmul) -> list[dict[str, Any]]:
    taken = {(subject.case, subject.engine): of for subject, of in zip(ready, times)}
    return [_row(subject, taken, memories, *matmul[subject.case.dtype]) for subject in ready]


def _row(subject: BenchmarkCase, taken: dict[tuple[Case, str], Times], memories: dict[Case, Memory], matmul: Times,
         matmul_flops: float) -> dict[str, Any]:
    """One case as one engine runs it; None where there is nothing to say."""
    case, engine = subject.case, subject.engine
    times, dense, ours = taken[case, engine], taken.get((case.dense, engine)), taken[case, OURS]
    memory = memories[case] if engine == OURS else Memory(None, None)
    executed = None if case.train else case.executed_macs if engine == OURS else case.macs
    flops = 2 * case.batch * (executed or _TRAIN_MACS * case.macs)
    return {
        'case': str(case), 'engine': engine, 'step': 'train' if case.train else 'inference', 'model': case.model,
        'run': case.run or None,
        'reducer': str(case.reducer), 'rate': None if case.r or case.tokens else case.rate, 'r': case.r,
        'fused': case.fused, 'gather_impl': case.gather_impl or None,
        'plan': str(case.plan), 'reduce_at': list(case.plan.reductions),
        'tokens': [case.plan.keep[block] for block in case.plan.reductions], 'image_size': case.size,
        'batch_size': case.batch, 'dtype': case.dtype, 'parameters': subject.parameters, 'macs': case.macs,
        'executed_macs': executed,
        'compile_seconds': subject.compile_seconds, 'memory_bytes': memory.bytes, 'memory_from': memory.source,
        'images_per_second': case.batch / times.median,
        'latency_p50_ms': 1e3 * times.percentile(50) if case.batch == 1 else None,
        'latency_p95_ms': 1e3 * times.percentile(95) if case.batch == 1 else None,
        'macs_dense_over_this': case.dense.macs / case.macs,
        'speedup_over_dense': times.faster_than(dense) if dense else None,
        'share_of_matmul': flops / matmul_flops * times.faster_than(matmul),
        'ours_over_this': ours.faster_than(times), 'calls_timed': len(times.calls) or None,
        'seconds_per_call': times.turns}
