"""Timing in turns: what comes when, and what is made of the seconds."""

import collections
import time

import numpy as np
import pytest

from evit_jax.benchmarks import clock
from evit_jax.benchmarks.clock import Benchmark, Times


def sleeper(name, seconds, calls=None, **changes):
    def call(number):
        if calls is not None:
            calls.append((name, number))
        time.sleep(seconds)

    return Benchmark(name, call, lambda result: None, **changes)


def test_in_every_round_everything_has_one_turn_and_the_order_changes():
    calls = []
    clock.interleave([sleeper(name, 0.001, calls) for name in 'abcd'], rounds=6, seconds=1e-9)
    assert len(calls) == 8 + 6 * 4 * 2  # two calls before; then each turn's first, and one that counts
    turns = [name for name, _ in calls[8::2]]
    rounds = [turns[start:start + 4] for start in range(0, 24, 4)]
    assert all(sorted(names) == list('abcd') for names in rounds) and len({*map(tuple, rounds)}) > 1


def test_no_two_calls_of_a_contender_have_the_same_number():
    calls = []
    clock.interleave([sleeper(name, 0.001, calls, least=3) for name in 'ab'], rounds=3, seconds=0.03)
    assert max(collections.Counter(calls).values()) == 1
    assert sorted(number for name, number in calls if name == 'a') == list(range(sum(n == 'a' for n, _ in calls)))


def test_the_slower_of_two_measures_slower():
    fast, slow = clock.interleave([sleeper('fast', 0.002), sleeper('slow', 0.04)], rounds=5, seconds=0.6)
    assert fast.median >= 0.002 and slow.median >= 0.04
    assert 1.5 < fast.faster_than(slow) < 25 and slow.faster_than(fast) < 0.7  # 20, were nothing else running
    assert len(fast.calls) > len(slow.calls) >= 5 and slow.percentile(95) >= slow.percentile(50) >= 0.04


def test_a_ratio_is_that_of_turns_in_the_same_round():
    assert Times((1, 10, 100), ()).faster_than(Times((2, 20, 50), ())) == 2
    assert Times((1, 5, 2), ()).median == 2 and np.isnan(Times((1,), ()).percentile(50))


def test_with_calls_under_way_none_is_timed_by_itself_and_all_are_waited_for():
    waited, most, under_way = [], 0, []

    def call(number):
        nonlocal most
        under_way.append(number)
        most = max(most, len(under_way))
        return number

    def wait(number):
        under_way.remove(number)
        waited.append(number)
        time.sleep(0.001)

    times, = clock.interleave([Benchmark('busy', call, wait, ahead=3, least=7)], rounds=2, seconds=1e-9)
    assert most == 3 and not under_way and waited == list(range(2 + 2 * 8)) and times.calls == ()


@pytest.mark.parametrize('changes', [{'rounds': 0}, {'seconds': 0}, {'contenders': []}])
def test_nothing_to_time_is_refused(changes):
    with pytest.raises(ValueError, match='there must be some of each'):
        clock.interleave(**{'contenders': [sleeper('a', 0)], 'rounds': 1, 'seconds': 1} | changes)
