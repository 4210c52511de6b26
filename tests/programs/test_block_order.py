"""Rates and token counts stay with their blocks, for every order of the blocks."""

import contextlib
import itertools
import json
import sys

import numpy as np
import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.checkpoints.loaded import LoadedModel, saved_budget
from evit_jax.models import get_config
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.plan_checks import by_depth
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.reduction.reducer import modules_at
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT
from evit_jax.reduction.registry import get_reducer, list_reducers
from evit_jax.runtime import distributed
from evit_jax.training import experiment, loop, model_setup
from tests.helpers import layouts, program_modules

least, main = layouts.least, program_modules.module_fixture('main')
CONFIG = get_config('deit_s')
PAIRS = (3, 0.9), (6, 0.7), (9, 0.5)
COUNTS = (3, 150), (6, 120), (9, 80)
IN_ANY_ORDER = pytest.mark.parametrize('order', list(itertools.permutations(range(3))), ids=str)


def ordered(pairs, order):
    return tuple(zip(*(pairs[number] for number in order), strict=True))


@pytest.mark.parametrize('reducer', map(get_reducer, list_reducers()), ids=str)
@IN_ANY_ORDER
def test_make_plan_in_any_order_equals_that_of_sorted_blocks(order, reducer):
    blocks, rates = ordered(PAIRS, order)
    assert make_plan(196, 12, rate=rates, reduce_at=blocks, reducer=reducer) == make_plan(
        196, 12, rate=(0.9, 0.7, 0.5), reducer=reducer)
    blocks, counts = ordered(COUNTS, order)
    assert make_plan(196, 12, tokens=counts, reduce_at=blocks, reducer=reducer) == make_plan(
        196, 12, tokens=(150, 120, 80), reducer=reducer)


def test_make_plan_of_unsorted_blocks_gives_each_its_own_rate():
    plan = make_plan(196, 12, rate=(0.5, 0.9, 0.7), reduce_at=(9, 3, 6), fuse=False)
    assert [plan.keep[block] for block in (3, 6, 9)] == [177, 124, 62]


def test_make_plan_of_random_blocks_equals_that_of_sorted_blocks():
    rng = np.random.default_rng(0)
    for _ in range(50):
        blocks = rng.permutation(12)[:rng.integers(1, 7)]
        rates = rng.uniform(0.5, 1, len(blocks)).round(2)
        pairs = sorted(zip(blocks.tolist(), rates.tolist(), strict=True))
        assert make_plan(196, 12, rate=rates, reduce_at=blocks) == make_plan(
            196, 12, rate=[rate for _, rate in pairs], reduce_at=[block for block, _ in pairs])


@IN_ANY_ORDER
@pytest.mark.parametrize('key, pairs', [('keep.rates', PAIRS), ('keep.tokens', COUNTS)])
def test_schedule_in_any_order_equals_that_of_sorted_blocks(key, pairs, order):
    def plans_of(order):
        blocks, values = ordered(pairs, order)
        budget = saved_budget({'model.reduce_at': list(blocks), 'model.fuse': True, 'keep.rate': 1.0,
                               key: list(values)})
        return [budget.plans(196, 12, CONFIG.macs)(step / 5) for step in range(6)]

    assert plans_of(order) == plans_of((0, 1, 2))


def test_plan_file_in_any_order_is_the_same_plan(tmp_path):
    planned = PlanFile.of(make_plan(196, 12, tokens=(150, 120, 80)), 'deit_s', 224)
    plans = []
    for order in itertools.permutations(range(3)):
        blocks, counts = ordered(COUNTS, order)
        (tmp_path / 'plan.json').write_text(json.dumps(planned.metadata() | {'reduce_at': blocks, 'tokens': counts}))
        budget = TokenBudget(EVIT, (2,), True, (1.0,)).apply_plan(read_plan_file(tmp_path / 'plan.json'))
        plans.append(budget.plans(196, 12, CONFIG.macs)(1.0))
    assert set(plans) == {make_plan(196, 12, tokens=(150, 120, 80))}


def test_loaded_model_plan_values_follow_the_recorded_order_of_blocks():
    budget = TokenBudget(EVIT, (9, 3, 6), True, (0.5, 0.9, 0.7))
    trained = LoadedModel('a', 'deit_s', 1, {}, CONFIG, (), 224, (), (), None, 'float32', budget)
    assert trained.plan() == trained.plan(keep_rates=(0.5, 0.9, 0.7)) == make_plan(196, 12, rate=(0.9, 0.7, 0.5))
    assert trained.plan(tokens=(80, 150, 120)) == make_plan(196, 12, tokens=(150, 120, 80))


def test_main_with_blocks_and_rates_in_any_order_trains_the_same_plan(main, tmp_path, monkeypatch):
    configs, recipe = [], tmp_path / 'recipe.py'
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)
    monkeypatch.setattr(distributed, 'distributed', lambda collective_errors: contextlib.nullcontext())
    monkeypatch.setattr(loop, 'train', lambda config, workdir, **_: configs.append(config))
    recipe.write_text('from tests.helpers import layouts\n\ndef get_config():\n    return layouts.config_of()\n')
    monkeypatch.setattr(sys, 'argv', ['main', f'--config={recipe}', f'--workdir={tmp_path}',
                                      '--config.model.reduce_at=(1, 0)', '--config.keep.rates=(0.5, 0.75)',
                                      '--config.keep.start_epoch=1', '--config.keep.shrink_epochs=2'])
    with flagsaver.flagsaver():
        cli.run(main.main)
    run = experiment.setup(configs[0])
    assert run.plan == make_plan(16, 2, rate=(0.75, 0.5), reduce_at=(0, 1))
    # The log and the curves show the first reduction.
    assert model_setup.logged_keep_rate(run.flat_config, run.stages[-1]) == 0.75
    tokens = experiment.setup(layouts.config_of(model__reduce_at=(1, 0), keep__tokens=(4, 12), keep__start_epoch=1))
    assert model_setup.logged_keep_rate(tokens.flat_config, tokens.stages[-1]) == 12 / 16


@pytest.mark.parametrize('arguments, message', [
    ({'reduce_at': (9, 3, 9)}, r'\(9, 3, 9\) names a block twice'),
    ({'reduce_at': (9, 3, 6), 'rate': (0.5, 0.7)}, r'2 values for 3 reductions at blocks \(9, 3, 6\)'),
    ({'reduce_at': {9, 3, 6}, 'rate': (0.5, 0.9, 0.7)}, 'is a set, which has no order'),
    ({'rate': {0.9, 0.7, 0.5}}, 'rate=.* is a set, which has no order'),
    ({'rate': {3: 0.9, 6: 0.7, 9: 0.5}}, 'rate=.* is a dict'),
    ({'tokens': {3: 150, 6: 100, 9: 50}}, 'tokens=.* is a dict'), ({'tokens': {150, 100, 50}}, 'tokens=.* is a set'),
    ({'reduce_at': {3: 0.9, 6: 0.7}}, 'reduce_at=.* is a dict'),
    ({'reduce_at': (3.5, 6, 9), 'rate': (0.9, 0.7, 0.5)}, r'reduce_at=\(3.5, 6, 9\): 3.5 is no whole number'),
    ({'reduce_at': (1.5, 2, 4)}, r'1.5 is no whole number: give blocks in 0..11'),
    ({'tokens': (9, 8, 7.5)}, '7.5 is no whole number')])
def test_make_plan_values_without_order_or_block_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_plan(196, 12, **arguments)


def test_make_plan_of_rising_tokens_warns_about_blocks_that_drop_nothing(caplog):
    assert make_plan(196, 12, tokens=(150, 151, 20)).reductions == (3, 9) and not caplog.text
    assert make_plan(196, 12, tokens=(20, 30, 40)).reductions == (3,)
    assert [record.levelname for record in caplog.records] == ['WARNING'] * 2
    assert 'tokens=(20, 30, 40): block 6 keeps all of its 21 tokens, because fewer than 30 enter it' in caplog.text


@pytest.mark.parametrize('values', [{0.9, 0.7, 0.5}, {3: 0.9, 6: 0.7, 9: 0.5}])
def test_loaded_model_plan_values_without_order_raise(values):
    trained = LoadedModel('a', 'deit_s', 1, {}, CONFIG, (), 224, (), (), None, 'float32',
                          TokenBudget(EVIT, (3, 6, 9), True, ()))
    for name in ('keep_rates', 'tokens'):
        with pytest.raises(ValueError, match=f'{name}=.* is no sequence'):
            trained.plan(**{name: values})


def test_make_plan_blocks_without_values_may_be_a_set():
    assert make_plan(196, 12, rate=0.7, reduce_at={9, 3, 6}) == make_plan(196, 12, rate=0.7)
    assert by_depth((5, 1), ('late', 'early'), 'names') == ('early', 'late')


def test_modules_at_other_blocks_than_trained_raises():
    def plan_at(*blocks):
        return make_plan(196, 12, rate=0.7, reduce_at=blocks, reducer=DYNAMICVIT)

    modules = modules_at(DYNAMICVIT, (9, 3, 6))
    modules.check(plan_at(3, 6, 9))
    modules.check(plan_at(3, 6))
    modules.check(make_plan(196, 12, rate=0.7, reduce_at=(6, 9)))  # EViT has no learned modules
    modules.check(TokenPlan(196, (None,) * 12, False, DYNAMICVIT))
    with pytest.raises(ValueError, match=r'the module trained at block 3 at block 6.* trained at the blocks '
                                         r'\(3, 6, 9\), and the plan reduces at \(6, 9\)'):
        modules.check(plan_at(6, 9))


def test_loaded_model_plan_file_that_shifts_learned_modules_raises():
    trained = LoadedModel('a', 'deit_s', 1, {}, CONFIG, (), 224, (), (), None, 'float32',
                          TokenBudget(DYNAMICVIT, (3, 6, 9), False, (0.7,) * 3), modules_at(DYNAMICVIT, (3, 6, 9)))
    planned = PlanFile('deit_s', 224, 196, 12, (6, 9), (120, 80), False)
    with pytest.raises(ValueError, match='the module trained at block 3 at block 6'):
        trained.plan(plan=planned)


def test_setup_evaluation_at_other_blocks_than_trained_raises():
    trained = {'model.image_size': 16, 'model.reduce_at': [1, 0], 'reducer.name': 'dynamicvit'}
    same = layouts.config_of(reducer__name='dynamicvit', model__reduce_at=(0, 1), keep__rates=(0.75, 0.5))
    assert experiment.setup(same, trained=trained).plan.keep == (12, 6)
    other = layouts.config_of(reducer__name='dynamicvit', model__reduce_at=(1,), keep__rate=0.5)
    with pytest.raises(ValueError, match='the module trained at block 0 at block 1'):
        experiment.setup(other, trained=trained)
