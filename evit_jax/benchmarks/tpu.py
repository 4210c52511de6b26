"""What the TPU compiler makes of a run's steps for a slice that need not be there. Estimates; nothing is measured."""

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
    """What is public of a kind."""

    hbm: float            # bytes
    clock: float          # Hz
    example: str          # of its slices
    devices: int = 1      # that a chip is to the compiler
    inferred: bool = False  # the clock: it is not published


# Clocks: v4 is published (ISCA 2023); v5e and v5p are what their published peak needs, 2 FLOPs in each of 4 MXUs of
# 128 x 128 (v5p: twice as many). The peak of v6e, 918 TFLOP/s, is 2 FLOPs in 4 MXUs of 256 x 256 at 1.75 GHz.
CHIPS = {
    'v5e': Chip(16e9, 1.5e9, 'v5e:16x16'),
    'v6e': Chip(32e9, 1.75e9, 'v6e:2x4', inferred=True),
    'v5p': Chip(95e9, 1.75e9, 'v5p:2x2x1'),
    'v4': Chip(32e9, 1.05e9, 'v4:2x2x1', devices=2),
}
# So that libtpu asks no TPU who it is, says nothing of it, and shares the machine with another of its kind. The
# accelerator named is not what is compiled for.
_ENVIRONMENT = {'TPU_SKIP_MDS_QUERY': '1', 'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'TPU_WORKER_HOSTNAMES': 'localhost',
                'TPU_WORKER_ID': '0', 'TPU_STDERR_LOG_LEVEL': '3', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}


class Exchange(NamedTuple):
    """All collectives of a kind."""

    count: float
    bytes: float   # of the arrays exchanged


class Compiled(NamedTuple):
    """A step compiled for a slice. All figures are those of one chip."""

    step: str
    plan: str
    images: int              # of a batch
    seconds: float           # that compiling took here
    arguments: float         # bytes, and so are the next four
    outputs: float           # in place of arguments, mostly
    temporaries: float
    peak: float              # all that is there at once, the program's code too
    bytes_accessed: float
    flops: float
    collectives: dict[str, Exchange]
    cycles: float            # the compiler's estimate
    unestimated: dict[str, int]  # what is not in it
    images_per_second: float  # by that estimate, at the chip's clock


def chip_of(topology: str) -> Chip:
    """The kind of a slice.

    Raises:
      ValueError: there is no such kind.
    """
    kind = topology.partition(':')[0]
    if kind not in CHIPS:
        raise ValueError(f'--topology={topology} names no TPU that is known here: there are {_examples()}')
    return CHIPS[kind]


def version() -> str:
    """Of the compiler; '' where it is not installed."""
    try:
        return importlib.metadata.version('libtpu')
    except importlib.metadata.PackageNotFoundError:
        return ''


def devices_of(topology: str) -> Sequence[jax.Device]:
    """The devices of a slice as the compiler sees them; to be called before anything touches a device.

    Raises:
      ValueError: there is no such slice, or the compiler is not installed.
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
        raise ValueError(f'--topology={topology} is no slice that the compiler knows ({first_line(error)}): '
                         f'name one as {_examples()}') from error


def compile_step(run: Experiment, step: str, plan: TokenPlan, topology: str) -> Compiled:
    """Compiles a step of a run that is laid out on the devices of a slice, exactly as training would run it.

    Args:
      step: one of STEPS.

    Raises:
      ValueError: the compiler refuses, as where the memory of a chip is too small.
    """
    chip, state = chip_of(topology), run.abstract_state()
    make, first = {'train': (run.train_step, state), 'eval': (run.eval_step, state.params)}[step]
    logging.info('%s step for %s, %s: the compiler has begun, and takes minutes for a large model', step, topology,
                 plan)
    begin = time.perf_counter()
    try:
        program = _compiled(make(), first, run.abstract_batch(), plan)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f'the {step} step does not compile for {topology}: {first_line(error)}') from error
    seconds = time.perf_counter() - begin
    logging.info('%s step compiled in %.0f s', step, seconds)
    return _figures(program, chip, step=step, plan=str(plan), seconds=seconds,
                    images=run.config.batch_size * chip.devices // run.mesh.size)


def cycles_of(function: Callable, device: jax.Device, arguments: Sequence[Any]) -> float:
    """The compiler's estimate for a function of one device, whose arrays lie as suits it: as within a larger program.

    Args:
      arguments: shapes.
    """
    anyhow = Format(Layout.AUTO, SingleDeviceSharding(device))
    step = jax.jit(function, in_shardings=anyhow, out_shardings=anyhow)
    return Program(_compiled(step, *arguments).as_text()).cycles().total


def _compiled(step: Callable, *arguments) -> jax.stages.Compiled:
    return step.trace(*arguments).lower(lowering_platforms=('tpu',)).compile()


def _figures(program, chip, **metadata) -> Compiled:
    memory, cost, text = program.memory_analysis(), program.cost_analysis(), Program(program.as_text())
    exchanged, cycles = collections.defaultdict(lambda: Exchange(0, 0)), text.cycles()
    for found in text.collectives():
        count, size = exchanged[found.kind]
        exchanged[found.kind] = Exchange(count + chip.devices * found.count,
                                         size + chip.devices * found.count * found.bytes)
    peak = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes)
    sizes = {'arguments': memory.argument_size_in_bytes, 'outputs': memory.output_size_in_bytes,
             'temporaries': memory.temp_size_in_bytes, 'peak': peak, 'flops': cost['flops'],
             'bytes_accessed': cost['bytes accessed']}
    return Compiled(**metadata, **{name: chip.devices * size for name, size in sizes.items()},
                    collectives=dict(exchanged), cycles=cycles.total, unestimated=cycles.unestimated,
                    images_per_second=metadata['images'] * chip.clock / cycles.total)


def rows_of(programs: Sequence[Compiled], chip: Chip) -> list[tuple[str, ...]]:
    """For a table that has a column for each program."""
    rows = {
        'compiled in': lambda p: f'{p.seconds:,.0f} s', 'images': lambda p: f'{p.images:,}',
        'HBM: arguments': lambda p: _size(p.arguments), 'outputs': lambda p: _size(p.outputs),
        'temporaries': lambda p: _size(p.temporaries),
        'peak': lambda p: _size(p.peak), f'peak, of {_size(chip.hbm)}': lambda p: f'{p.peak / chip.hbm:.1%}',
        'bytes accessed': lambda p: _size(p.bytes_accessed), 'FLOPs': lambda p: f'{p.flops / 1e9:,.1f} G'}
    kinds = sorted({kind for program in programs for kind in program.collectives})
    rows |= {kind: lambda p, kind=kind: _exchange(p.collectives.get(kind)) for kind in kinds or ['collectives']}
    rows |= {'estimated cycles': lambda p: f'{p.cycles / 1e6:,.2f} M',
             'estimated images/s': lambda p: f'{p.images_per_second:,.0f}'}
    return [(name, *(cell(program) for program in programs)) for name, cell in rows.items()]


def remarks(programs: Sequence[Compiled], chip: Chip) -> list[str]:
    """What the figures are not."""
    left_out = collections.Counter()
    for program in programs:
        left_out.update(program.unestimated)
    clock = f'{chip.clock / 1e9:.2f} GHz' + (' (inferred from the peak: the clock is not published)'
                                             if chip.inferred else '')
    return [
        'Compiler estimates, not measured. All figures are of one chip; the bytes of a collective are those of the '
        'whole arrays summed or collected.',
        f'images/s: at {clock}, if a step took the estimated cycles and no more. Not in these: the collectives, and '
        'what the compiler gives no estimate for: '
        + (', '.join(f'{count} {name}' for name, count in sorted(left_out.items())) or 'nothing') + '.']


def _examples() -> str:
    return ', '.join(chip.example for chip in CHIPS.values())


def _size(count: float) -> str:
    return f'{count / 1e9:,.2f} GB' if count >= 1e9 else f'{count / 1e6:,.2f} MB'


def _exchange(found: Exchange | None) -> str:
    return f'{found.count:,.0f}: {_size(found.bytes)}' if found else 'none'
