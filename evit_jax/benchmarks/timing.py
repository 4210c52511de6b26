"""Times benchmarks interleaved, in rounds, so that a slow phase of the machine affects all of them equally."""

import collections
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging


class Benchmark(NamedTuple):
    """A function to time."""

    name: str
    call: Callable[[int], Any]   # number of the call -> result, which may not be computed yet
    wait: Callable[[Any], Any]   # blocks until a result is computed
    in_flight: int = 1           # maximum number of concurrent calls; 1 waits for each call before the next one
    min_calls: int = 1           # minimum number of calls in a turn, independent of the time they take


class Times(NamedTuple):
    """Measured times of one benchmark, in seconds."""

    turns: tuple[float, ...]   # mean time of a call in each round
    calls: tuple[float, ...]   # time of every call; empty if calls are concurrent

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def percentile(self, percent: float) -> float:
        """Returns a percentile of the times of single calls; NaN if calls were concurrent."""
        return float(np.percentile(self.calls, percent)) if self.calls else float('nan')

    def faster_than(self, other: 'Times') -> float:
        """Returns the speed relative to another benchmark in the same rounds: the median of the ratios of all rounds.
        """
        return statistics.median(theirs / own for own, theirs in zip(self.turns, other.turns, strict=True))


def interleave(benchmarks: Sequence[Benchmark], *, rounds: int, seconds: float, seed: int = 0) -> list[Times]:
    """Times each benchmark once per round. The order is random in each round.

    Calls are numbered, so that a benchmark can vary its input. First, each benchmark is called twice; the second call
    determines the number of calls in a turn. These calls are not counted. The first call of every turn is not counted
    either, because caches are cold and threads of the previous benchmark may still be active.

    Args:
      benchmarks: benchmarks to time.
      rounds: number of rounds.
      seconds: approximate total time of all turns. A turn has at least `min_calls` calls.
      seed: seed of the order.

    Raises:
      ValueError: `benchmarks` is empty, or `rounds` or `seconds` is not positive.
    """
    if not benchmarks or rounds < 1 or seconds <= 0:
        raise ValueError(f'{len(benchmarks)} benchmarks, {rounds} rounds and {seconds} seconds: give at least one '
                         'benchmark, one round and a positive time')
    share, order = seconds / rounds / len(benchmarks), random.Random(seed)
    calls = [_calls_of_turn(benchmark, share) for benchmark in benchmarks]
    turns, singles, begin = [[] for _ in benchmarks], [[] for _ in benchmarks], time.perf_counter()
    for turn in range(rounds):
        for number in order.sample(range(len(benchmarks)), len(benchmarks)):
            first = 2 + turn * (1 + calls[number])
            benchmarks[number].wait(benchmarks[number].call(first))
            taken, single = _time_turn(benchmarks[number], calls[number], first=first + 1)
            turns[number].append(taken / calls[number])
            singles[number] += single
        left = (time.perf_counter() - begin) / (turn + 1) * (rounds - turn - 1)
        logging.info('round %d of %d measured, about %.0f s to go', turn + 1, rounds, left)
    return [Times(tuple(of_turns), tuple(of_calls)) for of_turns, of_calls in zip(turns, singles)]


def _calls_of_turn(benchmark: Benchmark, seconds: float) -> int:
    """Returns the number of calls that take about `seconds`."""
    benchmark.wait(benchmark.call(0))
    begin = time.perf_counter()
    benchmark.wait(benchmark.call(1))
    return max(benchmark.min_calls, round(seconds / (time.perf_counter() - begin)))


def _time_turn(benchmark: Benchmark, calls: int, first: int) -> tuple[float, list[float]]:
    """Returns the total seconds of all calls, and the seconds of each call; [] if calls are concurrent."""
    pending, single = collections.deque(), []
    begin = since = time.perf_counter()
    for number in range(first, first + calls):
        pending.append(benchmark.call(number))
        if len(pending) == benchmark.in_flight:
            benchmark.wait(pending.popleft())
            single.append((now := time.perf_counter()) - since)
            since = now
    while pending:
        benchmark.wait(pending.popleft())
    return time.perf_counter() - begin, single if benchmark.in_flight == 1 else []
