"""What is asked of the tokens: each way of saying it, on the way of a schedule."""

import pytest

from evit_jax.models import get_config
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.reducers import EVIT, TOME

SHAPE = get_config('deit_s')
DENSE = SHAPE.macs(make_plan(196, 12, reduce_at=()))
RATES = TokenBudget(EVIT, (3, 6, 9), True, (0.7, 0.7, 0.7))
WAYS = {'rates': RATES, 'tokens': RATES._replace(tokens=(120, 80, 40)), 'macs': RATES._replace(macs=0.5),
        'r': RATES._replace(reducer=TOME, r=13)}


def macs_of(budget, progress):
    return SHAPE.macs(budget.plans(196, 12, SHAPE.macs)(progress)) / DENSE


@pytest.mark.parametrize('way', WAYS)
def test_a_schedule_goes_from_dense_to_what_is_asked_and_never_back(way):
    found = [macs_of(WAYS[way], step / 4) for step in range(5)]
    assert found[0] == 1 and found == sorted(found, reverse=True) and len(set(found)) == 5


def test_at_its_end_stands_what_is_asked():
    final = {way: budget.plans(196, 12, SHAPE.macs)(1.0) for way, budget in WAYS.items()}
    assert final['rates'] == make_plan(196, 12, rate=0.7)
    assert final['tokens'] == make_plan(196, 12, tokens=(120, 80, 40))
    assert final['r'] == merge_plan(196, 12, r=13)
    assert macs_of(WAYS['macs'], 1.0) == pytest.approx(0.5, abs=0.005)
    assert macs_of(WAYS['macs'], 0.5) == pytest.approx(0.75, abs=0.0075)


def test_of_several_the_first_counts_and_one_rate_is_told():
    every = RATES._replace(reducer=TOME, tokens=(120, 80, 40), r=13, macs=0.8)
    assert macs_of(every, 1.0) == pytest.approx(0.8, abs=0.008)
    assert every._replace(macs=0.0).plans(196, 12, SHAPE.macs)(1.0) == merge_plan(196, 12, r=13)
    assert every.at(0.5) == TokenBudget(TOME, (3, 6, 9), True, (0.5,) * 3) and every.at(0.5).rate == 0.5
    assert (RATES.rate, every.rate, RATES._replace(rates=(0.7, 0.6, 0.5)).rate) == (0.7, None, None)


def test_configs_of_before_some_keys_were_there_are_read():
    told = {'model.reduce_at': [3, 6, 9], 'model.fuse': True, 'keep.rate': 0.7}
    assert TokenBudget.of_config(told) == RATES
    assert TokenBudget.of_config(told | {'keep.rates': [0.9, 0.8, 0.7]}).rates == (0.9, 0.8, 0.7)
    with pytest.raises(ValueError, match="unknown reducer 'tomme': did you mean tome"):
        TokenBudget.of_config(told | {'reducer.name': 'tomme'})
