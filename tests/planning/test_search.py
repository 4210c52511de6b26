"""The plan search against brute force, its targets and budgets, and the interpolation of costs."""

import itertools
import math
import time

import numpy as np
import pytest

from evit_jax.models import get_config
from evit_jax.models.costs import mlp_macs
from evit_jax.planning import search
from evit_jax.planning.search import BlockCosts, Costs, Target, find_plan, interpolate, parse_target, steps
from evit_jax.reduction.plan import make_plan

PATCHES, DEPTH = 9, 5


def random_costs(seed, most=PATCHES + 1):
    """Returns random costs that rise and fall. The costs of the last block are independent of the others."""
    rng = np.random.default_rng(seed)
    return Costs(3.0, *(BlockCosts(*(np.arange(most + 1) * scale + rng.uniform(0, spread, most + 1)
                                     for scale, spread in scales))
                        for scales in (((1.0, 4.0), (2.0, 4.0), (0.1, 1.0)), ((0.5, 6.0), (seed % 3, 9.0), (0, 1.0)))))


def smooth_costs(patches, prefix=1):
    n = np.arange(patches + prefix + 1.0)
    block = BlockCosts(n * 10 + n * n / 50, n * 20, n / 10)
    return Costs(100.0, block, block, prefix)


def every_plan(fuse, blocks, reductions, least):
    for count in range(reductions + 1):
        for at in itertools.combinations(blocks, count):
            yield from plans_at(at, fuse, least)


def plans_at(at, fuse, least):
    def go(n, share, kept):
        if len(kept) == len(at):
            yield make_plan(PATCHES, DEPTH, tokens=kept, reduce_at=at, fuse=fuse)
            return
        for keep in range(max(math.ceil(least * n), 1), n):
            if keep + fuse < n and keep <= math.ceil(share[0] * n / share[1]):
                yield from go(keep + fuse, (keep, n), (*kept, keep))

    return go(PATCHES, (1, 1), ())


@pytest.mark.parametrize('fuse', [True, False])
@pytest.mark.parametrize('seed, least', [(0, 0), (1, 0), (2, 0.3), (3, 0.5), (4, 0.5), (5, 0.7)])
def test_find_plan_equals_brute_force(seed, least, fuse):
    costs, blocks = random_costs(seed), (1, 2, 4)
    plans = list(every_plan(fuse, blocks, 3, least))
    dense = costs.total(make_plan(PATCHES, DEPTH, reduce_at=()))
    for share in (0.3, 0.5, 0.7, 0.85, 0.97):
        within = [plan for plan in plans if costs.total(plan) <= share * dense]
        plan = find_plan(costs, patches=PATCHES, depth=DEPTH, budget=share * dense, blocks=blocks, fuse=fuse,
                            least_rate=least)
        if not within:
            assert plan is None
            continue
        best = max(within, key=lambda plan: (sum(plan.counts), -costs.total(plan)))
        assert (sum(plan.counts), costs.total(plan)) == (sum(best.counts), pytest.approx(costs.total(best)))


def test_find_plan_keeps_at_least_as_many_tokens_as_a_constant_rate():
    costs = smooth_costs(196)
    for rate in (0.9, 0.7, 0.5):
        plain = make_plan(196, 12, rate=rate)
        plan = find_plan(costs, patches=196, depth=12, budget=costs.total(plain), blocks=range(3, 12))
        assert sum(plan.counts) >= sum(plain.counts) and costs.total(plan) <= costs.total(plain) * (1 + 1e-9)
        only = find_plan(costs, patches=196, depth=12, budget=costs.total(plain), blocks=(3, 6, 9))
        shares = [only.keep[block] / only.entering[block] for block in only.reductions]
        assert all(b <= a + 1 / 50 for a, b in itertools.pairwise(shares))


def test_find_plan_respects_reductions_and_returns_none_out_of_reach():
    costs = smooth_costs(196)
    ask = {'patches': 196, 'depth': 12, 'blocks': range(3, 12)}
    budget = costs.total(make_plan(196, 12, reduce_at=())) * 0.7
    assert len(find_plan(costs, budget=budget, reductions=1, **ask).reductions) == 1
    least = search.cheapest_plan(costs, least_rate=0.4, **ask)
    assert least == make_plan(196, 12, rate=0.4, reduce_at=(3, 4, 5))
    assert find_plan(costs, budget=costs.total(least) - 1, least_rate=0.4, **ask) is None
    assert find_plan(costs, budget=costs.total(least), least_rate=0.4, **ask) == least
    with pytest.raises(ValueError, match='block 12 is outside'):
        find_plan(costs, budget=1.0, patches=196, depth=12, blocks=(3, 12))


def test_find_plan_of_many_tokens_and_blocks_takes_seconds():
    costs, begin = smooth_costs(576), time.process_time()
    budget = costs.total(make_plan(576, 20, rate=0.7, reduce_at=(5, 10, 15)))
    assert find_plan(costs, patches=576, depth=20, budget=budget, blocks=range(5, 20))
    assert find_plan(costs, patches=576, depth=20, budget=budget, blocks=(5, 8, 11, 14, 17), reductions=4)
    assert time.process_time() - begin < 30


STAIRS = {n: 1.7 + n / 1000 + (n > 128) for n in [*range(8, 129, 8), 129, *range(136, 198, 8), 197]}


def test_interpolate_does_not_cross_a_step():
    assert steps(STAIRS) == [(128, 129)]
    coarse = {n: cost for n, cost in STAIRS.items() if n != 129}
    assert steps(coarse) == [(128, 136)]
    costs = interpolate(coarse, 197)
    assert costs[[128, 129, 132, 136]] == pytest.approx([1.828, 2.836, 2.836, 2.836]) and costs[100] == 1.8
    assert not steps({n: n + n * n / 100 for n in range(4, 200, 4)}) and not steps({8: 1.0})


def test_find_plan_stops_at_the_edge_of_a_step():
    block = BlockCosts(interpolate(STAIRS, 197), interpolate(STAIRS, 197), np.zeros(198))
    costs = Costs(1.0, block, block)
    budget = costs.total(make_plan(196, 12, tokens=(126,), reduce_at=(3,)))  # with class and fused token 128
    plan = find_plan(costs, patches=196, depth=12, budget=budget * 1.01, blocks=range(3, 12))
    assert plan == make_plan(196, 12, tokens=(126,), reduce_at=(3,))


@pytest.mark.parametrize('text, limit', [('2x', 5.0), ('40img/s', 0.4), ('3GMACs', 3e9), ('3000MMACs', 3e9)])
def test_budget_for_a_target_slower_than_dense_raises(text, limit):
    dense = {'dense_seconds': 10.0, 'dense_macs': 4e9, 'batch': 16}
    assert search.budget_for(parse_target(text), **dense) == limit
    slower = {'2x': '0.5x', '40img/s': '1img/s', '3GMACs': '5GMACs', '3000MMACs': '5000MMACs'}[text]
    has = {'2x': '1x', '40img/s': '1.6img/s', '3GMACs': '4GMACs', '3000MMACs': '4,000MMACs'}[text]
    with pytest.raises(ValueError, match=f'--target={slower} is slower than the dense model, which has {has}: nothing'):
        search.budget_for(parse_target(slower), **dense)


@pytest.mark.parametrize('name, head', [('deit_s', 0), ('lvvit_t', 240 * 1000)])
def test_mac_costs_equal_the_macs_of_the_model(name, head):
    config = get_config(name)
    macs = config.macs(make_plan(196, 12, reduce_at=()))
    costs = search.mac_costs(macs, patches=196, depth=12, width=config.width, mlp=mlp_macs(config), prefix=1,
                              head=head)
    for rate in (1.0, 0.7, 0.3):
        assert costs.total(make_plan(196, 12, rate=rate)) == config.macs(make_plan(196, 12, rate=rate))


def test_find_plan_with_a_free_last_block_does_not_reduce_in_it():
    whole = smooth_costs(196)
    costs = whole._replace(last=BlockCosts(*(part * 0 for part in whole.block)))
    dense, at_last = make_plan(196, 12, reduce_at=()), make_plan(196, 12, rate=0.5, reduce_at=(11,))
    assert costs.total(dense) == 100 + 11 * whole.block.total[197] == whole.total(dense) - whole.block.total[197]
    assert costs.total(at_last) == costs.total(dense) and whole.total(at_last) < whole.total(dense)
    ask = {'patches': 196, 'depth': 12, 'reductions': 1}
    assert find_plan(whole, budget=whole.total(dense) - 1000, blocks=(11,), **ask).reductions == (11,)
    assert find_plan(costs, budget=costs.total(dense) - 1000, blocks=(11,), **ask) is None
    assert find_plan(costs, budget=costs.total(dense) - 1000, blocks=(10, 11), **ask).reductions == (10,)


@pytest.mark.parametrize('text, target', [('2x', (2, 'x')), ('20000img/s', (2e4, 'img/s')),
                                          ('2e4 img/s', (2e4, 'img/s')), ('3.0GMACs', (3, 'GMACs'))])
def test_parse_target_returns_value_and_unit(text, target):
    assert parse_target(text) == Target(*target)


@pytest.mark.parametrize('text, message', [
    ('2', 'is not a number with one of the units x .*: give for example 2x'),
    ('2 furlongs', 'is not a number with one'), ('fast', 'is not a number with'),
    ('0x', '0 is not a number above 0'), ('1.2.3x', '1.2.3 is not a number above 0')])
def test_parse_target_of_bad_text_raises(text, message):
    with pytest.raises(ValueError, match=f'--target={text}.*{message}'):
        parse_target(text)
