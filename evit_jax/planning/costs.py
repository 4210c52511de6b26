"""What the parts of a model cost by the tokens in them: timed on this device, or estimated by the TPU compiler.

A table is made once and kept as JSON, and found again by what it is of.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from evit_jax import models
from evit_jax.benchmarks import clock, parts, report, subjects, tpu
from evit_jax.benchmarks.cases import Case
from evit_jax.benchmarks.clock import Benchmark, Times
from evit_jax.benchmarks.measured import MeasuredModel
from evit_jax.benchmarks.parts import Part
from evit_jax.data.progress import Progress
from evit_jax.models.config import ViTConfig
from evit_jax.planning.search import BlockCosts, Costs, curve
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime.names import look_up

THIS = 'this'
DEVICES = {THIS: None} | {f'tpu_{kind}': chip for kind, chip in tpu.CHIPS.items()}
_CACHE = '~/.cache/evit_jax/costs'
_CHAIN = 4        # times that a small part is done in one call, so that the call itself weighs little
_LARGE = 2e9      # multiply-accumulates of a part that is done once
_FINE = 128       # counts up to which every fourth is measured; in proportion fewer of more
_STEEPER = 1.3    # than usual: where a cliff is suspected
_CONCENTRATED = 1.2  # times as steep as the whole is the half of an interval that has a cliff in it, at least
_TILE = 128       # at its multiples accelerators round up: they are measured, and one more


class Asked(NamedTuple):
    """What a table is of."""

    model: str
    image_size: int
    batch: int
    dtype: str
    device: str  # of DEVICES
    fuse: bool = True
    run: MeasuredModel | None = None  # whose model it is; None: the named model

    @property
    def config(self) -> ViTConfig:
        return dataclasses.replace(self.run.config if self.run else models.get_config(self.model),
                                   image_size=self.image_size)

    def metadata(self) -> dict[str, Any]:
        """The values for JSON; costs do not depend on which run it is."""
        return {name: value for name, value in self._asdict().items() if name != 'run'}

    @property
    def patches(self) -> int:
        return self.config.patches(self.image_size)

    @property
    def most(self) -> int:
        """Tokens in all."""
        return self.patches + self.config.prefix

    def key(self) -> dict[str, Any]:
        """All that decides the costs; touches the device, if it is this one."""
        metadata = self.metadata() | {'shape': repr(self.config), 'jax': jax.__version__, 'parts': _COUNTED,
                                  'sources': _sources()}
        if self.device != THIS:
            return metadata | {'libtpu': tpu.version()}
        device = subjects.device()
        metadata |= {'kind': device.device_kind, 'processor': report.processor()}
        return metadata | ({'threads': report.cpus()} if device.platform == 'cpu' else {})


class Table(NamedTuple):
    """Seconds of one batch; by all tokens in the part, where a part has a count."""

    of: dict[str, Any]           # what it is a table of
    outside: float               # the blocks, heads with all tokens included
    dense: float | None          # the whole model as it was timed; None: nobody has
    attention: dict[int, float]
    mlp: dict[int, float]
    reduction: dict[int, float]
    short: dict[int, float]      # the last block, where the heads read the prefix alone; else empty
    heads: dict[int, float]      # where they read all tokens; else empty

    def costs(self, most: int, prefix: int) -> Costs:
        """For the planner, up to so many tokens; drawn out so that the dense model takes as long as it did.

        In a whole model the parts find caches and memory as others leave them.
        """
        def drawn(part):
            return curve(rising(part) if self.dense else part, most)

        block = BlockCosts(drawn(self.attention), drawn(self.mlp), drawn(self.reduction))
        nothing = np.zeros(most + 1)
        # A last block of which the prefix alone is asked drops nothing that anything reads.
        last, heads = (BlockCosts(drawn(self.short), nothing, nothing), nothing) if self.short else (
            block, drawn(self.heads))
        scale = 1.0
        if self.dense and self.dense > self.outside:
            blocks = (self.of['depth'] - 1) * block.whole[most] + last.whole[most]
            scale = (self.dense - self.outside) / blocks
        block, last = (BlockCosts(*(part * scale for part in of)) for of in (block, last))
        return Costs(self.outside - heads[most], block, last._replace(leaving=last.leaving + heads), prefix)


_COUNTED = Table._fields[3:]  # the parts with a count


@functools.cache
def _sources() -> str:
    """A digest of the code that decides what the parts cost, and what they are estimated to."""
    root = pathlib.Path(models.__file__).parents[1]
    files = [*sorted(root.glob('models/*.py')), *sorted(root.glob('reduction/**/*.py')),
             *(root / 'benchmarks' / f'{name}.py' for name in ('parts', 'tpu', 'hlo'))]
    return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:16]


def rising(known: Mapping[int, float]) -> dict[int, float]:
    """The nearest costs (by squares) that never fall with the count: what is faster with more tokens is noise."""
    pools = []  # [sum, number] of costs that fell
    for count in sorted(known):
        pools.append([known[count], 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, number = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + number]
    return dict(zip(sorted(known), np.concatenate([[total / number] * number for total, number in pools]).tolist()))


def find(asked: Asked, make: Callable[[Asked], Table], file: str | os.PathLike | None = None) -> Table:
    """The table from where it was kept; otherwise made, and kept.

    Args:
      file: to keep it in; None: one of its own in the user's cache.

    Raises:
      ValueError: the file holds a table of something else, or none, or cannot be written.
    """
    key = json.loads(json.dumps(asked.key() | {'depth': asked.config.depth}))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    place = pathlib.Path(file or f'{_CACHE}/{asked.model}_{digest}.json').expanduser()
    if place.exists():
        table = _read(place)
        if differ := [name for name in key if table.of.get(name) != key[name]]:
            name = differ[0]
            raise ValueError(f'--costs={place} are those of {name}={table.of.get(name)}, and {name}={key[name]} is '
                             'asked for: name another file, and they are measured anew')
        logging.info('costs are those of %s', place)
        return table
    report.check_writable('--costs', place)
    table = make(asked)._replace(of=key)
    report.write_json(place, table._asdict())
    logging.info('costs are kept in %s', place)
    return table


def make(asked: Asked, seconds: float = 60.0, rounds: int = 5) -> Table:
    """Measures or estimates, as the device asked for is this one or a TPU."""
    chip = look_up('device', asked.device, DEVICES)
    return _timed(asked, seconds, rounds) if chip is None else _estimated(asked, chip)


def side_by_side(asked: Asked, plans: Sequence[TokenPlan], seconds: float, rounds: int) -> list[Times]:
    """Whole models under plans, timed in turns on this device."""
    stock = subjects.ModelCache()
    ready = [subjects.inference(case_of(asked, plan), stock) for plan in plans]
    return clock.interleave([subject.contender(rounds) for subject in ready], rounds=rounds, seconds=seconds)


def case_of(asked: Asked, plan: TokenPlan) -> Case:
    """A plan as what `benchmark model` measures."""
    planned = PlanFile.of(plan, asked.model, asked.image_size)
    case = Case(asked.model, 1.0, planned.fuse, asked.image_size, asked.batch, asked.dtype, planned.reduce_at,
                tokens=planned.tokens)
    if asked.run:
        case = case._replace(run=asked.run.run, run_config=asked.run.config, reducer=asked.run.budget.reducer)
    return case if plan.reductions else case.dense


def counts(least: int, most: int) -> list[int]:
    """Token counts to be measured: every fourth or so, the edges of tiles, and both ends."""
    step = 4 * -(-most // _FINE)
    return sorted({least, most, *range(step, most, step), *_edges(most)} - {*range(least)})


def refined(cost_of: Callable[[int], float], first: Iterable[int]) -> dict[int, float]:
    """Costs at a few counts, and at more where the slope jumps, until a cliff there is found to the token."""
    found = {count: cost_of(count) for count in sorted(first)}

    def slope(a, b):
        return (found[b] - found[a]) / (b - a)

    pairs = list(itertools.pairwise(found))
    usual = statistics.median(slope(*pair) for pair in pairs)
    for a, b in pairs:
        steepness = _STEEPER * usual
        while b - a > 1 and slope(a, b) > steepness:
            steepness, middle = _CONCENTRATED * slope(a, b), (a + b) // 2
            found[middle] = cost_of(middle)
            a, b = max((a, middle), (middle, b), key=lambda half: slope(*half))
    return dict(sorted(found.items()))


def _timed(asked: Asked, seconds: float, rounds: int) -> Table:
    config, batch, dtype = asked.config, asked.batch, asked.dtype
    found = counts(config.prefix + 1, asked.most)
    wanted = {('outside', 0): parts.whole(config, asked.image_size, batch, dtype, depth=0),
              ('dense', 0): parts.whole(config, asked.image_size, batch, dtype)}
    for n in found:
        macs = batch * n * config.width * config.width * 2 * config.mlp_ratio
        times = 1 if macs > _LARGE else _CHAIN
        wanted |= {(name, n): parts.half(config, name, n, batch, dtype, times) for name in parts.HALVES}
    name, end = _end(config)
    for n in [*found[1:-1:4], found[-1]]:
        wanted['reduction', n] = parts.reduction(config, n, batch, dtype, asked.fuse, _CHAIN)
        wanted[name, n] = end(config, n, batch, dtype, _CHAIN)
    logging.info('the costs of %s in batches of %d, %s, are measured once: %d programs are compiled, then timed',
                 asked.model, batch, dtype, len(wanted))
    progress, contenders = Progress('compiling', len(wanted), 'programs'), []
    for key, part in wanted.items():
        contenders.append(_contender(f'{key[0]} {key[1]}', part))
        progress.add(1)
    timed = clock.interleave(contenders, rounds=rounds, seconds=seconds)
    # What disturbs makes slower alone, and there are too many programs to time each for long.
    return _table({key: min(taken.turns) / part.times for (key, part), taken in zip(wanted.items(), timed)})


def _contender(name: str, part: Part) -> Benchmark:
    inputs = [jax.device_put(part.filled(seed), subjects.device()) for seed in range(2)]
    program = jax.jit(part.run).lower(*inputs[0]).compile()
    return Benchmark(name, lambda number: program(*inputs[number % 2]), jax.block_until_ready,
                     ahead=1 if subjects.device().platform == 'cpu' else 2)


def _estimated(asked: Asked, chip: tpu.Chip) -> Table:
    """Of one chip, if it takes the cycles that the compiler estimates, and no more."""
    if asked.batch % chip.devices:
        raise ValueError(f'--batch={asked.batch}: a chip of {asked.device} divides a batch among {chip.devices}: give '
                         f'{asked.batch + chip.devices - asked.batch % chip.devices}')
    device = tpu.devices_of(chip.example)[0]
    config, batch, dtype = asked.config, asked.batch // chip.devices, asked.dtype

    def seconds(part):
        return tpu.cycles_of(part.run, device, part.arguments) / chip.clock

    def costs(name, part):
        def cost(n):
            logging.info('compiling %s with %d tokens', name, n)
            return seconds(part(n))

        return {(name, n): cost for n, cost in refined(cost, found).items()}

    found = spread(config.prefix + 1, asked.most)
    table = {('outside', 0): seconds(parts.whole(config, asked.image_size, batch, dtype, depth=0))}
    for name in parts.HALVES:
        table |= costs(name, lambda n, name=name: parts.half(config, name, n, batch, dtype))
    name, end = _end(config)
    table |= costs(name, lambda n: end(config, n, batch, dtype))
    for n in found[1::4]:
        table['reduction', n] = seconds(parts.reduction(config, n, batch, dtype, asked.fuse))
    return _table(table)


def spread(least: int, most: int) -> Sequence[int]:
    """A few counts to begin with, where each costs a compilation."""
    return sorted({least, most, *range(32, most, 32), *_edges(most)})


def _edges(most: int) -> list[int]:
    """The most tokens that a tile holds, and one more."""
    return [edge + more for edge in range(_TILE, most, _TILE) for more in (0, 1)]


def _table(found: Mapping[tuple[str, int], float]) -> Table:
    def by_count(name):
        return {n: cost for (kind, n), cost in found.items() if kind == name}

    return Table({}, found['outside', 0], found.get(('dense', 0)), *map(by_count, _COUNTED))


def _end(config: ViTConfig) -> tuple[str, Callable[..., Part]]:
    """What the tokens that the heads read decide of the model's end: its name in the table, and the part."""
    return ('heads', parts.heads) if config.head_reads_patches else ('short', parts.short_block)


def _read(place: pathlib.Path) -> Table:
    try:
        told = json.loads(place.read_text())
        known = {name: {int(n): cost for n, cost in told[name].items()} for name in _COUNTED}
        return Table(told['of'], told['outside'], told['dense'], **known)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'--costs={place} holds no costs ({error}): delete it, and they are measured anew') from error
