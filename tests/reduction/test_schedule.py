import bisect
import itertools

import pytest

from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.schedule import KeepSchedule, Stage, progress, stages

CHANGING = [(0, 40, 8), (10, 100, 8), (10, 100, 2), (7, 33, 3), (3, 5, 50), (5, 0, 4), (0, 1, 8), (2, 1, 2)]
BASES = [0.5, 0.7, 0.9, (0.9, 0.7, 0.5), (1.0, 0.5, 0.7)]


def plans_of(base, fuse=True):
    """Progress -> plan, with as many rates as `base` has."""
    bases = base if isinstance(base, tuple) else (base,) * 3
    return lambda done: make_plan(
        196, 12, rate=bases if done == 1 else tuple(1 - (1 - rate) * done for rate in bases), fuse=fuse)


def plan_of_step(out, step):
    return out[bisect.bisect_right([stage.start for stage in out], step) - 1].plan


def every_schedule(test):
    test = pytest.mark.parametrize('schedule', [KeepSchedule(*values) for values in CHANGING], ids=str)(test)
    return pytest.mark.parametrize('base', BASES, ids=str)(test)


@every_schedule
@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
def test_no_step_keeps_fewer_tokens_in_any_block_than_the_exact_rate(schedule, base, fuse):
    plan_at, steps = plans_of(base, fuse), schedule.start + schedule.length + 10
    out = stages(schedule, plan_at, steps)
    for step in range(steps):
        exact = plan_at(progress(schedule, step)).counts
        assert all(ours >= least for ours, least in zip(plan_of_step(out, step).counts, exact, strict=True)), step


@every_schedule
def test_stages_are_at_most_the_levels_and_end_exactly_at_the_base_plan(schedule, base):
    end = schedule.start + schedule.length
    out = stages(schedule, plans_of(base), end + 1)
    assert len(out) <= schedule.levels
    assert out[0].start == 0
    assert out[0].plan == make_plan(196, 12)
    assert out[-1].plan == make_plan(196, 12, rate=base)
    assert out[-1].start <= end
    assert all(a.start < b.start and a.plan != b.plan for a, b in itertools.pairwise(out))


@every_schedule
def test_stage_starts_at_the_first_step_whose_exact_rate_has_come_so_far(schedule, base):
    for stage in stages(schedule, plans_of(base), 1000)[1:]:
        assert progress(schedule, stage.start - 1) < stage.progress <= progress(schedule, stage.start)


def test_levels_are_used_where_the_cosine_has_time_for_them():
    assert len(stages(KeepSchedule(10, 1000, 8), plans_of(0.5), 2000)) == 8


@pytest.mark.parametrize('total', [0, 5, 10, 11, 60, 110, 111])
def test_stages_past_the_end_of_the_run_are_left_out(total):
    schedule, plan_at = KeepSchedule(10, 100, 8), plans_of(0.5)
    whole = stages(schedule, plan_at, 1000)
    assert stages(schedule, plan_at, total) == tuple(stage for stage in whole if stage.start < total)
    assert whole[-1].start == 110


@pytest.mark.parametrize('levels', [1, 8])
@pytest.mark.parametrize('base', BASES, ids=str)
def test_constant_schedule_is_one_stage_at_the_base_plan(base, levels):
    out = stages(KeepSchedule(0, 0, levels), plans_of(base), 100)
    assert out == (Stage(0, 1.0, make_plan(196, 12, rate=base)),)


def test_two_levels_are_dense_and_then_the_base_plan():
    out = stages(KeepSchedule(10, 100, 2), plans_of(0.7), 200)
    assert out == (Stage(0, 0.0, make_plan(196, 12)), Stage(110, 1.0, make_plan(196, 12, rate=0.7)))


@pytest.mark.parametrize('start, length', [(0, 10), (10, 100), (10, 0)])
@pytest.mark.parametrize('levels', [1, 0])
def test_one_level_cannot_shrink(start, length, levels):
    with pytest.raises(ValueError, match=rf'levels={levels}: .* at least 2 levels'):
        stages(KeepSchedule(start, length, levels), plans_of(0.7), 1000)
