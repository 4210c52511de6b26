"""DynamicViT training: new token predictors with a separate learning rate, and evaluation with dropped tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import read_newest
from evit_jax.metrics import writers
from evit_jax.training import optimizer
from tests.helpers import layouts

QUIET = {'log__eval_epochs': 9.0, 'log__pictures': 0}
RECIPE = QUIET | {'reducer__name': 'dynamicvit', 'distill__kind': 'self', 'distill__token_weight': 0.5,
                  'model__drop_path': 0.0, 'optimizer__clip_norm': 0.0, 'optimizer__backbone_scale': 0.01,
                  'optimizer__backbone_from_epoch': 5.0}  # all epochs
PARAMS = {'head': {'kernel': jnp.ones((2, 3))}, 'reducer': {'0': {'kernel': jnp.ones((3, 2))}}}


@pytest.fixture(scope='module')
def dynamic(shared_run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('dynamic')
    changes = {'init_from': str(shared_run), 'keep__rate': 0.5, 'ema_decay': 0.0} | RECIPE
    return workdir, changes, layouts.train_here(workdir, **changes)


def test_train_with_a_frozen_backbone_changes_only_the_predictors(shared_run, dynamic):
    workdir, changes, metrics = dynamic
    before, after = (read_newest(folder, 'params')[0] for folder in (shared_run, workdir))
    fresh = layouts.setup(**changes).new_state().params
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)
    predictors = after.keys() - before.keys()
    assert {name.split('.')[0] for name in predictors} == {'reducer'}
    change = np.abs(after['reducer.0.in_conv.1.kernel']
                    - np.asarray(fresh['reducer'][0]['in_conv'][1]['kernel']))
    assert change.max() > 1e-3 and np.isfinite(metrics['loss'])


def test_train_logs_the_four_parts_of_the_loss(dynamic):
    first = next(record for record in writers.read_metrics(dynamic[0] / 'metrics.jsonl') if 'train/loss' in record)
    weights = {'labels': 1.0, 'teacher': 0.5, 'tokens': 0.5, 'kept': 2.0}
    total = sum(weight * first[f'train/loss/{name}'] for name, weight in weights.items())
    np.testing.assert_allclose(first['train/loss'], total, rtol=1e-5)


def test_train_keeps_all_tokens_and_evaluate_workdir_drops_them_or_uses_another_reducer(dynamic):
    workdir, changes, metrics = dynamic
    run = layouts.setup(**changes)
    assert run.stages[0].plan.counts == (16, 16) and run.plan.counts == (16, 8)
    assert metrics['macs'] < metrics['macs_dense']
    other = changes | {'reducer__name': 'evit', 'optimizer__backbone_scale': 1.0,
                       'optimizer__backbone_from_epoch': 0.0}
    assert 0 <= layouts.evaluate_here(workdir, **other)['top1'] <= 1
    assert load_model(workdir).modules.count == 1


def test_new_state_without_predictors_starts_from_a_run_with_them(dynamic):
    before, _ = read_newest(dynamic[0], 'params')
    state = layouts.setup(init_from=str(dynamic[0])).new_state()
    assert 'reducer' not in state.params
    np.testing.assert_array_equal(state.params['norm']['bias'], before['norm.bias'])


def test_adamw_with_backbone_scale_freezes_then_scales_the_backbone():
    plain, grouped = (optimizer.adamw(lambda _: 0.1, weight_decay=0.05, **options) for options in (
        {}, {'backbone_scale': 0.01, 'backbone_from': 2}))
    states = [adamw.init(PARAMS) for adamw in (plain, grouped)]
    for step, size in enumerate((-1.3, -0.3, 0.7, 1.7)):
        gradient = jax.tree.map(functools.partial(jnp.multiply, size), PARAMS)
        (want, states[0]), (got, states[1]) = (
            adamw.update(gradient, state, PARAMS) for adamw, state in zip((plain, grouped), states))
        np.testing.assert_array_equal(got['reducer']['0']['kernel'], want['reducer']['0']['kernel'])
        np.testing.assert_allclose(got['head']['kernel'], want['head']['kernel'] * (0 if step < 2 else 0.01), rtol=1e-6)


def test_adamw_without_backbone_options_has_the_state_of_optax_adamw():
    plain = optimizer.adamw(lambda _: 0.1, weight_decay=0.05)
    own = optax.chain(optax.adamw(lambda _: 0.1, weight_decay=0.05, mask=optimizer.decays))
    assert jax.tree.structure(plain.init(PARAMS)) == jax.tree.structure(own.init(PARAMS))
