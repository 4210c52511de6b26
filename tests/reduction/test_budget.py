"""Token budgets: rates, token counts, MACs and r, and the plans of a schedule for each of them."""

import pytest

from evit_jax.models import get_config
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.reducers import EVIT, TOME
from evit_jax.reduction.registry import get_reducer

CONFIG = get_config('deit_s')
DENSE = CONFIG.macs(make_plan(196, 12, reduce_at=()))
RATES = TokenBudget(EVIT, (3, 6, 9), True, (0.7, 0.7, 0.7))
BUDGETS = {'rates': RATES, 'tokens': RATES._replace(tokens=(120, 80, 40)), 'macs': RATES._replace(macs=0.5),
        'r': RATES._replace(reducer=TOME, r=13)}


def macs_of(budget, progress):
    return CONFIG.macs(budget.plans(196, 12, CONFIG.macs)(progress)) / DENSE


@pytest.mark.parametrize('name', BUDGETS)
def test_plans_of_a_schedule_start_dense_and_need_fewer_macs_at_each_step(name):
    macs = [macs_of(BUDGETS[name], step / 4) for step in range(5)]
    assert macs[0] == 1 and macs == sorted(macs, reverse=True) and len(set(macs)) == 5


def test_plans_at_the_end_of_a_schedule_meet_the_budget():
    final = {name: budget.plans(196, 12, CONFIG.macs)(1.0) for name, budget in BUDGETS.items()}
    assert final['rates'] == make_plan(196, 12, rate=0.7)
    assert final['tokens'] == make_plan(196, 12, tokens=(120, 80, 40))
    assert final['r'] == merge_plan(196, 12, r=13)
    assert macs_of(BUDGETS['macs'], 1.0) == pytest.approx(0.5, abs=0.005)
    assert macs_of(BUDGETS['macs'], 0.5) == pytest.approx(0.75, abs=0.0075)


def test_plans_of_several_budgets_follow_macs_before_r():
    combined = RATES._replace(reducer=TOME, tokens=(120, 80, 40), r=13, macs=0.8)
    assert macs_of(combined, 1.0) == pytest.approx(0.8, abs=0.008)
    assert combined._replace(macs=0.0).plans(196, 12, CONFIG.macs)(1.0) == merge_plan(196, 12, r=13)


def test_at_a_rate_replaces_the_budget_and_rate_is_none_for_other_budgets():
    combined = RATES._replace(reducer=TOME, tokens=(120, 80, 40), r=13, macs=0.8)
    assert combined.at(0.5) == TokenBudget(TOME, (3, 6, 9), True, (0.5,) * 3) and combined.at(0.5).rate == 0.5
    assert (RATES.rate, combined.rate, RATES._replace(rates=(0.7, 0.6, 0.5)).rate) == (0.7, None, None)


def test_of_config_reads_one_rate_or_a_rate_for_each_block():
    config = {'model.reduce_at': [3, 6, 9], 'model.fuse': True, 'reducer.name': 'evit', 'reducer.r': 0,
              'reducer.decreasing': False, 'keep.rate': 0.7, 'keep.rates': [], 'keep.tokens': [], 'keep.drop': [],
              'keep.macs': 0.0}
    assert TokenBudget.of_config(config) == RATES
    assert TokenBudget.of_config(config | {'keep.rates': [0.9, 0.8, 0.7]}).rates == (0.9, 0.8, 0.7)
    with pytest.raises(ValueError, match="unknown reducer 'tomme': did you mean tome"):
        TokenBudget.of_config(config | {'reducer.name': 'tomme'})


def test_plans_with_drops_drop_tokens_only_at_the_end_of_a_schedule():
    budget = RATES._replace(reducer=get_reducer('prune_merge'), tokens=(120, 80, 40), drop=(10, 0, 5))
    plan_at = budget.plans(196, 12, CONFIG.macs)
    assert plan_at(1.0) == make_plan(196, 12, tokens=(120, 80, 40), drop=(10, 0, 5), reducer=budget.reducer)
    assert plan_at(0.5).drop == () and plan_at(0.5).tokens[0] > 120
    assert budget.at(0.5).drop == ()


@pytest.mark.parametrize('changes, message', [
    ({'tokens': ()}, 'without token counts'), ({'reducer': TOME}, 'reducer tome does not drop'),
    ({'drop': (1, 2)}, 'has 2 values for 3'), ({'drop': (0, 41, 0)}, 'block 6: drop=41 .*drop at most 40')])
def test_plans_with_invalid_drops_raises(changes, message):
    budget = RATES._replace(reducer=get_reducer('prune_merge'), tokens=(120, 80, 40), drop=(10, 0, 5))
    with pytest.raises(ValueError, match=message):
        budget._replace(**changes).plans(196, 12, CONFIG.macs)
