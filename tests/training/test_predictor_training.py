"""DynamicViT trained as a user does it: predictors begin fresh, learn at their own rate, and are used by a gather."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import read_newest
from evit_jax.metrics import writers
from evit_jax.training import experiment, loop, optimizer
from tests.helpers import layouts

QUIET = {'log__eval_epochs': 9.0, 'log__pictures': 0}
RECIPE = QUIET | {'reducer__name': 'dynamicvit', 'distill__kind': 'self', 'distill__token_weight': 0.5,
                  'model__drop_path': 0.0, 'optimizer__clip_norm': 0.0, 'optimizer__backbone_scale': 0.01,
                  'optimizer__backbone_from_epoch': 5.0}  # all epochs
PARAMS = {'head': {'kernel': jnp.ones((2, 3))}, 'score_predictor': {'0': {'kernel': jnp.ones((3, 2))}}}


least = layouts.least


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('dense')
    loop.train(layouts.config_of(keep__rate=1.0, ema_decay=0.0, **QUIET), workdir)
    return workdir


@pytest.fixture(scope='module')
def dynamic(dense, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('dynamic')
    config = layouts.config_of(init_from=str(dense), keep__rate=0.5, ema_decay=0.0, **RECIPE)
    return workdir, config, loop.train(config, workdir)


def test_predictors_learn_beside_a_backbone_that_stays_to_the_bit(dense, dynamic):
    workdir, config, metrics = dynamic
    before, after = (read_newest(folder, 'params')[0] for folder in (dense, workdir))
    fresh = experiment.setup(config).new_state().params
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    predictors = after.keys() - before.keys()
    assert {name.split('.')[0] for name in predictors} == {'score_predictor'}
    remap = np.abs(after['score_predictor.0.in_conv.1.kernel']
                   - np.asarray(fresh['score_predictor'][0]['in_conv'][1]['kernel']))
    assert remap.max() > 1e-3 and np.isfinite(metrics['loss'])


def test_all_four_parts_are_logged_and_sum_up(dynamic):
    first = next(record for record in writers.read_metrics(dynamic[0] / 'metrics.jsonl') if 'train/loss' in record)
    weights = {'labels': 1.0, 'teacher': 0.5, 'tokens': 0.5, 'kept': 2.0}
    total = sum(weight * first[f'train/loss/{name}'] for name, weight in weights.items())
    np.testing.assert_allclose(first['train/loss'], total, rtol=1e-5)


def test_it_trains_with_all_tokens_and_is_evaluated_with_fewer_or_under_another_reducer(dynamic):
    workdir, config, metrics = dynamic
    laid = experiment.setup(config)
    assert laid.stages[0].plan.counts == (16, 16) and laid.plan.counts == (16, 8)
    assert metrics['macs'] < metrics['macs_dense']
    other = config.copy_and_resolve_references()
    other.update_from_flattened_dict({'reducer.name': 'evit', 'optimizer.backbone_scale': 1.0,
                                      'optimizer.backbone_from_epoch': 0.0})
    assert 0 <= loop.evaluate_workdir(other, workdir)['top1'] <= 1
    assert load_model(workdir).config.predictors == 1


def test_a_run_without_predictors_begins_from_one_with_them(dynamic):
    config = layouts.config_of(init_from=str(dynamic[0]))
    taken, _ = read_newest(dynamic[0], 'params')
    state = experiment.setup(config).new_state()
    assert 'score_predictor' not in state.params
    np.testing.assert_array_equal(state.params['norm']['bias'], taken['norm.bias'])


def test_the_backbone_waits_and_then_goes_at_its_share_of_the_rate():
    plain, grouped = (optimizer.adamw(lambda _: 0.1, weight_decay=0.05, **how) for how in (
        {}, {'backbone_scale': 0.01, 'backbone_from': 2}))
    states = [of.init(PARAMS) for of in (plain, grouped)]
    for step, size in enumerate((-1.3, -0.3, 0.7, 1.7)):
        gradient = jax.tree.map(functools.partial(jnp.multiply, size), PARAMS)
        (want, states[0]), (got, states[1]) = (
            of.update(gradient, state, PARAMS) for of, state in zip((plain, grouped), states))
        np.testing.assert_array_equal(got['score_predictor']['0']['kernel'], want['score_predictor']['0']['kernel'])
        np.testing.assert_allclose(got['head']['kernel'], want['head']['kernel'] * (0 if step < 2 else 0.01), rtol=1e-6)


def test_a_plain_run_has_the_optimizer_that_it_had():
    plain = optimizer.adamw(lambda _: 0.1, weight_decay=0.05)
    own = optax.chain(optax.adamw(lambda _: 0.1, weight_decay=0.05, mask=optimizer.decays))
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(own.init(PARAMS))
