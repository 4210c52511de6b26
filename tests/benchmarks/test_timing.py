"""Interleaved timing: order and numbers of the calls, and the times computed from them."""

import collections
import time

import numpy as np
import pytest

from evit_jax.benchmarks import timing
from evit_jax.benchmarks.timing import Benchmark, Times


def sleeper(name, seconds, calls=None, **changes):
    def call(number):
        if calls is not None:
            calls.append((name, number))
        time.sleep(seconds)

    return Benchmark(name, call, lambda result: None, **changes)


def test_interleave_every_round_times_each_benchmark_once_in_a_new_order():
    calls = []
    timing.interleave([sleeper(name, 0.001, calls) for name in 'abcd'], rounds=6, seconds=1e-9)
    assert len(calls) == 8 + 6 * 4 * 2  # two calls of each benchmark, then two calls in each turn
    turns = [name for name, _ in calls[8::2]]
    rounds = [turns[start:start + 4] for start in range(0, 24, 4)]
    assert all(sorted(names) == list('abcd') for names in rounds) and len({*map(tuple, rounds)}) > 1


def test_interleave_calls_of_a_benchmark_have_distinct_numbers():
    calls = []
    timing.interleave([sleeper(name, 0.001, calls, min_calls=3) for name in 'ab'], rounds=3, seconds=0.03)
    assert max(collections.Counter(calls).values()) == 1
    assert sorted(number for name, number in calls if name == 'a') == list(range(sum(n == 'a' for n, _ in calls)))


def test_interleave_of_a_slow_and_a_fast_function_ranks_them():
    fast, slow = timing.interleave([sleeper('fast', 0.002), sleeper('slow', 0.04)], rounds=5, seconds=0.6)
    assert fast.median >= 0.002 and slow.median >= 0.04
    assert 1.5 < fast.faster_than(slow) < 25 and slow.faster_than(fast) < 0.7  # 20 on an idle machine
    assert len(fast.calls) > len(slow.calls) >= 5 and slow.percentile(95) >= slow.percentile(50) >= 0.04


def test_times_faster_than_is_the_median_of_the_ratios_by_round():
    assert Times((1, 10, 100), ()).faster_than(Times((2, 20, 50), ())) == 2
    assert Times((1, 5, 2), ()).median == 2 and np.isnan(Times((1,), ()).percentile(50))


def test_interleave_with_calls_in_flight_waits_for_all_and_times_none_alone():
    waited, most, pending = [], 0, []

    def call(number):
        nonlocal most
        pending.append(number)
        most = max(most, len(pending))
        return number

    def wait(number):
        pending.remove(number)
        waited.append(number)
        time.sleep(0.001)

    times, = timing.interleave([Benchmark('busy', call, wait, in_flight=3, min_calls=7)], rounds=2, seconds=1e-9)
    assert most == 3 and not pending and waited == list(range(2 + 2 * 8)) and times.calls == ()


@pytest.mark.parametrize('changes', [{'rounds': 0}, {'seconds': 0}, {'benchmarks': []}])
def test_interleave_without_benchmarks_rounds_or_time_raises(changes):
    with pytest.raises(ValueError, match='give at least one benchmark'):
        timing.interleave(**{'benchmarks': [sleeper('a', 0)], 'rounds': 1, 'seconds': 1} | changes)
