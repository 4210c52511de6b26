"""Times several things in turns, round after round, so that what slows the machine slows them alike."""

import collections
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging


class Benchmark(NamedTuple):
    """Something to be timed."""

    name: str
    call: Callable[[int], Any]   # number of the call -> its result, which need not be there yet
    wait: Callable[[Any], Any]   # returns when a result is there
    ahead: int = 1               # calls under way at a time; 1: each is waited for before the next
    least: int = 1               # calls of a turn, however long they take


class Times(NamedTuple):
    """Seconds that calls took."""

    turns: tuple[float, ...]   # a call on average, in each round
    calls: tuple[float, ...]   # every call; empty where several are under way at a time

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def percentile(self, percent: float) -> float:
        """Of the single calls; nan where none was timed by itself."""
        return float(np.percentile(self.calls, percent)) if self.calls else float('nan')

    def faster_than(self, other: 'Times') -> float:
        """How many times as fast as another of the same interleaving: the median of what each round says."""
        return statistics.median(theirs / own for own, theirs in zip(self.turns, other.turns, strict=True))


def interleave(contenders: Sequence[Benchmark], *, rounds: int, seconds: float, seed: int = 0) -> list[Times]:
    """Times each contender once a round, in another order each round.

    Every call has another number, so that a contender can vary its input. Two calls of each come first and do not
    count; the second says how many make a turn. Nor does the first call of a turn count, which finds the caches cold
    and perhaps threads of the one before still awake.

    Args:
      seconds: of all turns together, about: a turn has at least `least` calls.
      seed: of the orders.

    Raises:
      ValueError: nothing to time, or no time for it.
    """
    if not contenders or rounds < 1 or seconds <= 0:
        raise ValueError(f'{len(contenders)} things to time in {rounds} rounds and {seconds} seconds: there must be '
                         'some of each')
    share, order = seconds / rounds / len(contenders), random.Random(seed)
    calls = [_calls_of_turn(contender, share) for contender in contenders]
    turns, singles, begin = [[] for _ in contenders], [[] for _ in contenders], time.perf_counter()
    for turn in range(rounds):
        for number in order.sample(range(len(contenders)), len(contenders)):
            first = 2 + turn * (1 + calls[number])
            contenders[number].wait(contenders[number].call(first))
            taken, single = _turn(contenders[number], calls[number], first=first + 1)
            turns[number].append(taken / calls[number])
            singles[number] += single
        left = (time.perf_counter() - begin) / (turn + 1) * (rounds - turn - 1)
        logging.info('round %d of %d measured, about %.0f s to go', turn + 1, rounds, left)
    return [Times(tuple(of_turns), tuple(of_calls)) for of_turns, of_calls in zip(turns, singles)]


def _calls_of_turn(contender: Benchmark, seconds: float) -> int:
    contender.wait(contender.call(0))
    begin = time.perf_counter()
    contender.wait(contender.call(1))
    return max(contender.least, round(seconds / (time.perf_counter() - begin)))


def _turn(contender: Benchmark, calls: int, first: int) -> tuple[float, list[float]]:
    """Seconds of all calls, and of each where they come one by one."""
    under_way, single = collections.deque(), []
    begin = since = time.perf_counter()
    for number in range(first, first + calls):
        under_way.append(contender.call(number))
        if len(under_way) == contender.ahead:
            contender.wait(under_way.popleft())
            single.append((now := time.perf_counter()) - since)
            since = now
    while under_way:
        contender.wait(under_way.popleft())
    return time.perf_counter() - begin, single if contender.ahead == 1 else []
