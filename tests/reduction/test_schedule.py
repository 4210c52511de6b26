"""Stages of the keep-rate schedule: one plan each, never below the exact rate."""

import bisect
import itertools

import pytest

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.schedule import KeepSchedule, Stage, progress, stages

CHANGING = [(0, 40, 8), (10, 100, 8), (10, 100, 2), (7, 33, 3), (3, 5, 50), (5, 0, 4), (0, 1, 8), (2, 1, 2)]
BASES = [0.5, 0.7, 0.9, (0.9, 0.7, 0.5), (1.0, 0.5, 0.7)]


def plans_of(base, fuse=True):
    """Returns a function from the progress of a schedule to a plan, with as many rates as `base` has."""
    bases = base if isinstance(base, tuple) else (base,) * 3
    return lambda fraction: make_plan(
        196, 12, rate=bases if fraction == 1 else tuple(1 - (1 - rate) * fraction for rate in bases), fuse=fuse)


def plan_of_step(result, step):
    return result[bisect.bisect_right([stage.start for stage in result], step) - 1].plan


def every_schedule(test):
    test = pytest.mark.parametrize('schedule', [KeepSchedule(*values) for values in CHANGING], ids=str)(test)
    return pytest.mark.parametrize('base', BASES, ids=str)(test)


@every_schedule
@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
def test_stages_keep_at_least_the_tokens_of_the_exact_rate_at_every_step(schedule, base, fuse):
    plan_at, steps = plans_of(base, fuse), schedule.start + schedule.length + 10
    result = stages(schedule, plan_at, steps)
    for step in range(steps):
        exact, counts = plan_at(progress(schedule, step)).counts, plan_of_step(result, step).counts
        assert all(count >= minimum for count, minimum in zip(counts, exact, strict=True)), step


@every_schedule
def test_stages_number_at_most_the_levels_and_end_at_the_base_plan(schedule, base):
    end = schedule.start + schedule.length
    result = stages(schedule, plans_of(base), end + 1)
    assert len(result) <= schedule.levels
    assert result[0].start == 0
    assert result[0].plan == make_plan(196, 12)
    assert result[-1].plan == make_plan(196, 12, rate=base)
    assert result[-1].start <= end
    assert all(a.start < b.start and a.plan != b.plan for a, b in itertools.pairwise(result))


@every_schedule
def test_stages_start_at_the_first_step_that_reaches_their_progress(schedule, base):
    for stage in stages(schedule, plans_of(base), 1000)[1:]:
        assert progress(schedule, stage.start - 1) < stage.progress <= progress(schedule, stage.start)


def test_stages_of_a_long_schedule_use_all_levels():
    assert len(stages(KeepSchedule(10, 1000, 8), plans_of(0.5), 2000)) == 8


@pytest.mark.parametrize('total', [0, 5, 10, 11, 60, 110, 111])
def test_stages_after_the_last_step_are_omitted(total):
    schedule, plan_at = KeepSchedule(10, 100, 8), plans_of(0.5)
    whole = stages(schedule, plan_at, 1000)
    assert stages(schedule, plan_at, total) == tuple(stage for stage in whole if stage.start < total)
    assert whole[-1].start == 110


@pytest.mark.parametrize('levels', [1, 8])
@pytest.mark.parametrize('base', BASES, ids=str)
def test_stages_of_a_constant_schedule_are_the_base_plan_alone(base, levels):
    result = stages(KeepSchedule(0, 0, levels), plans_of(base), 100)
    assert result == (Stage(0, 1.0, make_plan(196, 12, rate=base)),)


def test_stages_with_two_levels_are_the_dense_and_the_base_plan():
    result = stages(KeepSchedule(10, 100, 2), plans_of(0.7), 200)
    assert result == (Stage(0, 0.0, make_plan(196, 12)), Stage(110, 1.0, make_plan(196, 12, rate=0.7)))


@pytest.mark.parametrize('start, length', [(0, 10), (10, 100), (10, 0)])
@pytest.mark.parametrize('levels', [1, 0])
def test_stages_with_fewer_than_two_levels_raise(start, length, levels):
    with pytest.raises(ValueError, match=rf'levels={levels}: .* at least 2 levels'):
        stages(KeepSchedule(start, length, levels), plans_of(0.7), 1000)
