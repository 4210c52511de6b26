"""Compiles the steps of a run for a TPU slice, and reports the compiler's estimates. No TPU is needed.

Nothing is measured.
"""

import collections
import importlib.metadata
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from evit_jax.benchmarks.hlo import Program
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime.backend import first_line
from evit_jax.training.experiment import Experiment

STEPS = ('train', 'eval')


class Chip(NamedTuple):
    """Published properties of one kind of TPU chip."""

    hbm: float            # bytes
    clock: float          # Hz
    example: str          # topology of one slice
    devices: int = 1      # number of devices that the compiler sees per chip
    inferred: bool = False  # True if the clock is not published, but inferred from the peak FLOP/s


# Clocks: v4 is published (ISCA 2023). v5e and v5p follow from the published peak at 2 FLOPs in each cell of 4 MXUs of
# 128 x 128 (v5p: 8 MXUs). The peak of v6e, 918 TFLOP/s, is 2 FLOPs in each cell of 4 MXUs of 256 x 256 at 1.75 GHz.
CHIPS = {
    'v5e': Chip(16e9, 1.5e9, 'v5e:16x16'),
    'v6e': Chip(32e9, 1.75e9, 'v6e:2x4', inferred=True),
    'v5p': Chip(95e9, 1.75e9, 'v5p:2x2x1'),
    'v4': Chip(32e9, 1.05e9, 'v4:2x2x1', devices=2),
}
# Settings that let libtpu start without a TPU and without warnings, even if another process has loaded it. This
# accelerator type does not affect the topology to compile for.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
                'TPU_WORKER_ID': '0', 'TPU_STDERR_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


class Collectives(NamedTuple):
    """All collectives of one kind."""

    count: float
    bytes: float   # total size of the arrays


class CompiledStep(NamedTuple):
    """Figures of a step compiled for a slice. All figures are per chip."""

    step: str
    plan: str
    images: int              # number of images in a batch
    seconds: float           # compile time on this machine
    arguments: float         # bytes
    outputs: float           # bytes; most of them alias the arguments
    temporaries: float       # bytes
    peak: float              # bytes at the peak, including the code of the program
    bytes_accessed: float
    flops: float
    collectives: dict[str, Collectives]
    cycles: float            # estimate of the compiler
    unestimated: dict[str, int]  # name -> number of operations without an estimate
    images_per_second: float  # computed from the estimated cycles and the chip's clock


def chip_of(topology: str) -> Chip:
    """Returns the chip of a topology such as 'v5e:16x16'.

    Raises:
      ValueError: the chip is unknown.
    """
    kind = topology.partition(':')[0]
    if kind not in CHIPS:
        raise ValueError(f'--topology={topology} names no known TPU: there are {_examples()}')
    return CHIPS[kind]


def version() -> str:
    """Returns the version of libtpu; '' if it is not installed."""
    try:
        return importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        return ''


def devices_of(topology: str) -> Sequence[jax.Device]:
    """Returns the compiler's devices for a slice. Call this function before JAX initialises a backend.

    Raises:
      ValueError: the slice does not exist, or the compiler is not installed.
    """
    chip_of(topology)
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("the TPU compiler is not installed: pip install -e '.[tpu-aot]' (libtpu; needs no TPU)")
    jax.config.update('jax_platforms', 'cpu')
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ValueError(f'--topology={topology} is not a slice of the compiler ({first_line(error)}): '
                         f'give one such as {_examples()}') from error


def compile_step(run: Experiment, step: str, plan: TokenPlan, topology: str) -> CompiledStep:
    """Compiles a step of a run exactly as in training.

    Args:
      run: the run, set up on the devices of the slice.
      step: one of STEPS.

    Raises:
      ValueError: compilation fails, for example because a chip has too little memory.
    """
    chip, state = chip_of(topology), run.abstract_state()
    make, first = {'train': (run.train_step, state), 'eval': (run.eval_step, state.params)}[step]
    logging.info('compiling the %s step for %s, %s; a large model takes minutes', step, topology, plan)
    begin = time.perf_counter()
    try:
        program = _compile(make(), first, run.abstract_batch(), plan)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f'the {step} step does not compile for {topology}: {first_line(error)}') from error
    seconds = time.perf_counter() - begin
    logging.info('%s step compiled in %.0f s', step, seconds)
    return _figures(program, chip, step=step, plan=str(plan), seconds=seconds,
                    images=run.config.batch_size * chip.devices // run.mesh.size)


def cycles_of(function: Callable, device: jax.Device, arguments: Sequence[Any]) -> float:
    """Returns the compiler's estimate of the cycles that a function takes on one device.

    The compiler chooses the layouts of arguments and results, as within a larger program.

    Args:
      arguments: shapes and dtypes of the arguments.
    """
    layout = Format(Layout.AUTO, SingleDeviceSharding(device))
    step = jax.jit(function, in_shardings=layout, out_shardings=layout)
    return Program(_compile(step, *arguments).as_text()).cycles().total


def _compile(step: Callable, *arguments) -> jax.stages.Compiled:
    return step.trace(*arguments).lower(lowering_platforms=('tpu',)).compile()


def _figures(program, chip, **metadata) -> CompiledStep:
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), Program(program.as_text())
    by_kind, cycles = collections.defaultdict(lambda: Collectives(0, 0)), text.cycles()
    for collective in text.collectives():
        count, size = by_kind[collective.kind]
        by_kind[collective.kind] = Collectives(count + chip.devices * collective.count,
                                               size + chip.devices * collective.count * collective.bytes)
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    sizes = {'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
             'temporaries': memory.temp_size_in_bytes, 'peak': peak, 'flops': cost['flops'],
             'bytes_accessed': cost['bytes accessed']}
    return CompiledStep(**metadata, **{name: chip.devices * size for name, size in sizes.items()},
                        collectives=dict(by_kind), cycles=cycles.total, unestimated=cycles.unestimated,
                        images_per_second=metadata['images'] * chip.clock / cycles.total)


def table_rows(programs: Sequence[CompiledStep], chip: Chip) -> list[tuple[str, ...]]:
    """Returns the rows of a table that has one column per program."""
    rows = {
        'compiled in': lambda p: f'{p.seconds:,.0f} s', 'images': lambda p: f'{p.images:,}',
        'HBM: arguments': lambda p: _size(p.arguments), 'outputs': lambda p: _size(p.outputs),
        'temporaries': lambda p: _size(p.temporaries),
        'peak': lambda p: _size(p.peak), f'peak, of {_size(chip.hbm)}': lambda p: f'{p.peak / chip.hbm:.1%}',
        'bytes accessed': lambda p: _size(p.bytes_accessed), 'FLOPs': lambda p: f'{p.flops / 1e9:,.1f} G'}
    kinds = sorted({kind for program in programs for kind in program.collectives})
    rows |= {kind: lambda p, kind=kind: _collectives(p.collectives.get(kind)) for kind in kinds or ['collectives']}
    rows |= {'estimated cycles': lambda p: f'{p.cycles / 1e6:,.2f} M',
             'estimated images/s': lambda p: f'{p.images_per_second:,.0f}'}
    return [(name, *(cell(program) for program in programs)) for name, cell in rows.items()]


def remarks(programs: Sequence[CompiledStep], chip: Chip) -> list[str]:
    """Returns lines that explain the figures and their limits."""
    unestimated = collections.Counter()
    for program in programs:
        unestimated.update(program.unestimated)
    clock = f'{chip.clock / 1e9:.2f} GHz' + (' (inferred from the peak: the clock is not published)'
                                             if chip.inferred else '')
    return [
        'Compiler estimates, not measured. All figures are per chip. The bytes of a collective are those of the whole '
        'arrays that it sums or gathers.',
        f'images/s: at {clock}, if a step took exactly the estimated cycles. The estimate leaves out the collectives '
        'and the operations that the compiler does not estimate: '
        + (', '.join(f'{count} {name}' for name, count in sorted(unestimated.items())) or 'none') + '.']


def _examples() -> str:
    return ', '.join(chip.example for chip in CHIPS.values())


def _size(count: float) -> str:
    return f'{count / 1e9:,.2f} GB' if count >= 1e9 else f'{count / 1e6:,.2f} MB'


def _collectives(collectives: Collectives | None) -> str:
    return f'{collectives.count:,.0f}: {_size(collectives.bytes)}' if collectives else 'none'
