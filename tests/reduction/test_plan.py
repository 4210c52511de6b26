"""Token plans: counts of kept and merged tokens, plans for a fraction of the MACs, and invalid plans."""

import math

import pytest

from evit_jax.models import get_config
from evit_jax.reduction.plan import TokenPlan, make_plan, merge_plan, plan_of_macs, plans_of
from evit_jax.reduction.reducer import FunctionReducer
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT, POOL, TOME
from evit_jax.reduction.registry import get_reducer, list_reducers


@pytest.mark.parametrize('rate, fuse, counts', [
    (0.7, True, (139, 99, 71)), (0.5, True, (99, 51, 27)), (0.7, False, (138, 97, 68)), (0.5, False, (98, 49, 25))])
def test_make_plan_with_a_rate_has_the_counts_of_the_paper(rate, fuse, counts):
    plan = make_plan(196, 12, rate=rate, fuse=fuse)
    assert plan.reductions == (3, 6, 9)
    assert plan.counts == (196,) * 3 + tuple(count for count in counts for _ in range(3))


def test_make_plan_with_a_rate_for_each_reduction_uses_them_in_order():
    plan = make_plan(100, 4, rate=(0.9, 1.0, 0.5), reduce_at=(0, 1, 3), fuse=False)
    assert plan.keep == (90, None, None, 45)
    assert plan.counts == (90, 90, 90, 45)


def test_make_plan_with_tokens_keeps_them_and_adds_the_fused_token():
    plan = make_plan(16, 4, tokens=(10, 4), reduce_at=(1, 2), rate=0.9)
    assert plan.keep == (None, 10, 4, None)
    assert plan.counts == (16, 11, 5, 5)


def test_make_plan_with_tokens_not_below_the_entering_count_drops_nothing():
    plan = make_plan(16, 3, tokens=(16, 8, 9), reduce_at=(0, 1, 2))
    assert plan.keep == (None, 8, None)  # 9 tokens enter block 2: 8 and the fused one
    assert plan.counts == (16, 9, 9)


@pytest.mark.parametrize('rate', [1, 1.0, (1.0, 1.0, 1.0), 0.999])
def test_make_plan_with_a_rate_that_keeps_every_token_has_no_reductions(rate):
    plan = make_plan(196, 12, rate=rate)
    assert plan.keep == (None,) * 12
    assert plan.counts == (196,) * 12
    assert plan.reductions == ()


def test_plans_with_equal_counts_are_equal_and_hash_alike():
    assert len({make_plan(16, 4, rate=rate, reduce_at=[1]) for rate in (0.5, 0.49, 0.5)}) == 1
    assert len({make_plan(16, 4, rate=0.5, reduce_at=[1], fuse=fuse) for fuse in (True, False)}) == 2


def test_masks_tokens_is_true_only_for_a_reducer_that_masks():
    plan = make_plan(16, 3, rate=0.5, reduce_at=(1,), reducer=DYNAMICVIT)
    assert not plan.masks_tokens and plan.in_training().masks_tokens
    assert str(plan.in_training()) == '16 tokens, 8 of them unmasked at blocks (1,), dynamicvit (masked)'
    assert not make_plan(16, 3, rate=0.5, reduce_at=(1,)).masks_tokens
    assert not make_plan(16, 3, reduce_at=(1,)).masks_tokens


def test_masks_tokens_of_a_plan_that_fuses_one_token_is_false():
    plan = TokenPlan(16, (None, 15, None), True)  # the fused token replaces the dropped one: no count changes
    assert plan.counts == (16, 16, 16) and not plan.masks_tokens
    assert str(plan) == '16 > 16 tokens at blocks (1,), fused'


@pytest.mark.parametrize('arguments, message', [
    ({'rate': 0}, r'keep rate 0 is outside \(0, 1\]'),
    ({'rate': -0.5}, r'keep rate -0\.5 is outside \(0, 1\]'),
    ({'rate': 1.1}, r'keep rate 1\.1 is outside \(0, 1\]'),
    ({'rate': (0.5, 0.5, 1.1)}, r'keep rate 1\.1 is outside'),
    ({'rate': math.nan}, r'keep rate nan is outside'),
    ({'reduce_at': (3, 6, 12)}, r'block 12 is outside 0\.\.11'),
    ({'reduce_at': (-1, 6)}, r'block -1 is outside 0\.\.11'),
    ({'reduce_at': (3, 6, 3)}, r'\(3, 6, 3\) names a block twice'),
    ({'rate': (0.5, 0.7)}, r'rate=\(0\.5, 0\.7\) has 2 values for 3 reductions'),
    ({'tokens': (9, 8, 7, 6)}, r'tokens=\(9, 8, 7, 6\) has 4 values for 3 reductions'),
    ({'tokens': (100, 0, 10)}, r'0 tokens cannot be kept, the least is 1'),
])
def test_make_plan_with_invalid_arguments_raises_with_value_and_limit(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(196, 12, **arguments)


def test_merge_plan_merges_r_tokens_in_every_block():
    assert merge_plan(196, 12, r=13).counts == tuple(196 - 13 * block for block in range(1, 13))


def test_merge_plan_that_decreases_merges_the_same_total_from_2_r_to_0():
    plan = merge_plan(196, 12, r=13, decreasing=True)
    merged = [n - left for n, left in zip(plan.entering, plan.counts)]
    assert sum(merged) == 12 * 13 and merged[0] == 26 and merged[-1] == 0
    line = [26 * (1 - block / 11) for block in range(12)]
    assert all(abs(count - target) <= 1 for count, target in zip(merged, line))


def test_merge_plan_with_progress_merges_that_fraction_of_r():
    counts = [merge_plan(64, 6, r=4, progress=progress).counts[-1] for progress in (0, 0.25, 0.5, 1)]
    assert counts == [64, 58, 52, 40]


def test_merge_plan_with_fewer_than_2_r_tokens_left_merges_half_of_them():
    assert merge_plan(16, 6, r=6).counts == (10, 5, 3, 2, 1, 1)


def test_merge_plan_with_a_number_for_each_block_merges_these_numbers():
    assert merge_plan(16, 4, r=(6, 0, 5, 1)).keep == (10, None, 5, 4)
    assert merge_plan(16, 3, r=[2] * 3) == merge_plan(16, 3, r=2)
    assert merge_plan(16, 3, r=(6, 0, 2), progress=0.5).counts == (13, 13, 12)
    assert merge_plan(16, 2, r=(12, 1), reducer=get_reducer('ward')).counts == (4, 3)


@pytest.mark.parametrize('arguments, message', [
    ({'r': (1, 2)}, r'r=1-2 has 2 numbers for 12 blocks'), ({'r': (-1, *[0] * 11)}, r'r=-1-0.*: -1 is no number'),
    ({'r': (98, 50, *[0] * 10)}, r'block 1 would merge 50 of its 98 tokens, and tome merges at most 49'),
    ({'r': (1.5, *[0] * 11)}, '1.5 is no number of tokens'), ({'r': [1] * 12, 'reducer': EVIT}, 'evit merges none'),
    ({'r': [1] * 12, 'decreasing': True}, 'decreasing=True is for one number'),
    ({'r': 99}, r'r=99 would merge 99 of 196 tokens .* 0 <= r <= 98'),
    ({'r': 50, 'decreasing': True}, r'r=50 would merge 100 of 196 .* 0 <= r <= 49'),
    ({'r': -1}, r'r=-1 would merge'), ({'r': 5, 'reducer': EVIT}, 'evit merges none')])
def test_merge_plan_with_an_invalid_r_raises_with_the_limit(arguments, message):
    with pytest.raises(ValueError, match=message):
        merge_plan(196, 12, **arguments)


@pytest.mark.parametrize('arguments', [{'rate': 0.4}, {'tokens': (97, 60, 40)}])
def test_make_plan_with_tome_and_less_than_half_raises(arguments):
    with pytest.raises(ValueError, match=r'block 3: r=\d+ of 196 tokens .* at most half of them, 98: keep 98 or more'):
        make_plan(196, 12, reducer=TOME, **arguments)
    assert make_plan(196, 12, reducer=POOL, **arguments).reductions == (3, 6, 9)


@pytest.mark.parametrize('reducer', map(get_reducer, list_reducers()), ids=str)
@pytest.mark.parametrize('name, at', [('deit_s', (3, 6, 9)), ('vit_digits', (0, 2, 4))])
@pytest.mark.parametrize('decreasing', [False, True])
def test_plan_of_macs_finds_a_plan_within_one_percent(name, at, reducer, decreasing):
    config = get_config(name)
    plans = plans_of(reducer, config.patches(config.image_size), config.depth, reduce_at=at, decreasing=decreasing)
    dense = config.macs(plans(0))
    for fraction in (0.9, 0.8, 0.7, 0.6, 0.5):
        plan = plan_of_macs(config.macs, fraction, plans)
        assert config.macs(plan) / dense == pytest.approx(fraction, rel=0.01)
    assert plan_of_macs(config.macs, 1, plans).reductions == ()


def test_plan_of_macs_with_a_fraction_out_of_reach_raises():
    config = get_config('deit_s')
    matched = FunctionReducer(TOME.reduce, name='matched', min_kept=TOME.min_kept)
    with pytest.raises(ValueError, match=r'has 0\.\d+ of the MACs, .* ask for more than 0\.4'):
        plan_of_macs(config.macs, 0.4, plans_of(matched, 196, 12, reduce_at=(6, 9)))
    with pytest.raises(ValueError, match=r'1\.2 of the MACs is outside'):
        plan_of_macs(config.macs, 1.2, plans_of(EVIT, 196, 12))
