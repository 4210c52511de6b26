"""Heads, epsilon, activation and pooling: computed as they are defined, counted, recorded, compared between runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from evit_jax import models
from evit_jax.checkpoints import continuation, weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.kernels.gelu import ACTIVATIONS
from evit_jax.models import NOT_IN_SHAPES, create
from evit_jax.models.config import POOLINGS, ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT, TOME
from evit_jax.training import evaluation_config
from tests.helpers import layouts

SHAPE = ViTConfig(image_size=16, patch_size=4, width=8, depth=2, heads=2, classes=3, init_std=0.3)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def of(**changes):
    return dataclasses.replace(SHAPE, **changes)


def run(config, plan, images=IMAGES, modules=NO_MODULES, **inputs):
    model = create(config, modules=modules)
    params = model.init(jax.random.key(0))
    return params, *model.apply(params, images, plan, **inputs)


def normalised(x, norm, epsilon=1e-6):
    x = np.asarray(x, np.float64)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * norm['scale'] + norm['bias']


def head(params, x):
    return x @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('name, want', [
    ('gelu', lambda x: x * 0.5 * (1 + special.erf(x / np.sqrt(2)))),
    ('quick_gelu', lambda x: x * special.expit(1.702 * x)),
    ('gelu_tanh', lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))])
def test_activations_are_those_of_their_names(name, want):
    x = np.linspace(-5, 5, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), want(x), atol=1e-6)
    assert ACTIVATIONS[name](jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('changes', [{'heads': 4}, {'norm_epsilon': 1e-2}, {'activation': 'quick_gelu'},
                                     {'activation': 'gelu_tanh'}, {'pooling': 'avg'}])
def test_each_value_changes_the_logits_of_the_same_weights(changes):
    plan, model = make_plan(16, 2, reduce_at=()), create(SHAPE)
    params = model.init(jax.random.key(0))
    logits = [create(shape).apply(params, IMAGES, plan)[0] for shape in (SHAPE, of(**changes))]
    assert np.abs(logits[0] - logits[1]).max() > 1e-5


@pytest.mark.parametrize('pooling', ['avg', 'avg_fc_norm'])
def test_the_head_reads_the_mean_of_the_patches(pooling):
    params, logits, seen = run(of(pooling=pooling), make_plan(16, 2, reduce_at=()))
    patches = np.asarray(seen['block01'], np.float64)[:, 1:]
    want = (normalised(patches, params['norm']).mean(1) if pooling == 'avg' else
            normalised(patches.mean(1), params['fc_norm']))
    np.testing.assert_allclose(logits, head(params, want), atol=1e-5)
    assert ('norm' in params) == (pooling == 'avg')


@pytest.mark.parametrize('reducer', [EVIT, TOME])
def test_the_mean_is_over_the_tokens_that_are_left_a_merged_one_by_its_patches(reducer):
    plan = make_plan(16, 2, rate=0.6, reduce_at=(0, 1), reducer=reducer)
    params, logits, seen = run(of(pooling='avg'), plan)
    tokens = normalised(seen['block01'], params['norm'])[:, 1:]
    count = np.array([np.bincount(index, minlength=tokens.shape[1]) for index in seen['token_of_patch'][-1]])
    weight = count if reducer is TOME else np.ones(tokens.shape[:2])
    assert reducer is EVIT or ((weight > 1).any() and weight.sum() == 2 * 16)
    want = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(logits, head(params, want), atol=1e-5)


def test_a_masked_token_is_no_part_of_the_mean():
    plan = make_plan(16, 2, rate=0.5, reduce_at=(1,), reducer=DYNAMICVIT).in_training()
    params, logits, seen = run(of(pooling='avg'), plan, modules=Modules(DYNAMICVIT, 1), key=jax.random.key(1))
    mask = np.asarray(seen['mask'][-1])
    assert 0 < mask.sum() < mask.size
    tokens = normalised(seen['block01'], params['norm'])[:, 1:]
    want = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(logits, head(params, want), atol=1e-5)


@pytest.mark.parametrize('changes', [{'pooling': name} for name in POOLINGS] + [
    {'distilled': True}, {'distilled': True, 'one_head': True}])
def test_parameters_and_macs_are_counted(changes):
    config, plan = of(**changes), make_plan(16, 2, rate=0.5, reduce_at=(1,))
    leaves = jax.tree.leaves(jax.eval_shape(create(config).init, jax.random.key(0)))
    assert config.parameters() == sum(leaf.size for leaf in leaves)
    heads = 2 if config.distilled and not config.one_head else 1
    blocks = config.macs(plan) - 16 * 48 * 8 - heads * 8 * 3
    assert blocks == of(distilled=config.distilled).macs(plan) - 16 * 48 * 8 - (1 + config.distilled) * 8 * 3
    assert (config.executed_macs(plan) == config.macs(plan)) == (config.pooling != 'token')


@pytest.mark.parametrize('shape, said', [
    (lambda: of(heads=3), 'a width of 8 cannot be divided among 3 heads: give one of 1, 2, 4, 8'),
    (lambda: of(heads=-2), 'among -2 heads'), (lambda: of(norm_epsilon=-1e-6), 'norm_epsilon=-1e-06 is outside'),
    (lambda: of(activation='relu'), "activation='relu' is unknown: there are gelu, "),
    (lambda: of(pooling='max'), "pooling='max' is unknown: there are token, "),
    (lambda: of(pooling='avg', distilled=True), 'reads no distillation token'),
    (lambda: of(one_head=True), 'give distilled=True'), (lambda: LVViTConfig(pooling='avg'), 'give pooling=token')])
def test_values_out_of_range_are_refused(shape, said):
    with pytest.raises(ValueError, match=said):
        shape()


OTHER = {'model__heads': 4, 'model__norm_epsilon': 1e-3, 'model__activation': 'quick_gelu', 'model__pooling': 'avg'}


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """Weights of other values than those of the named model."""
    layouts.prepare(monkeypatch)
    config = layouts.config_of(**OTHER).to_dict()
    params = create(models.config_from_flat(workdir.flat(config))).init(jax.random.key(0))
    weights.save(tmp_path / 'other', params, {'config': config})
    return tmp_path / 'other'


def test_a_run_starts_from_weights_of_its_own_values_alone(converted, tmp_path):
    with pytest.raises(ValueError, match=r'--config.model.heads=4 --config.model.norm_epsilon=0.001 --config.model.'
                                         r'activation=quick_gelu --config.model.pooling=avg'):
        layouts.train_here(tmp_path / 'run', init_from=str(converted))
    weights.check_values(converted, models.config_from_flat(workdir.flat(layouts.config_of(**OTHER).to_dict())))
    found = load_model(converted)
    assert [getattr(found.config, key) for key in NOT_IN_SHAPES] == [4, 1e-3, 'quick_gelu', 'avg', False]


@pytest.mark.parametrize('changes', [{'width': 32}, {'depth': 3}])
def test_weights_of_another_model_are_refused_with_its_name(converted, changes):
    other = dataclasses.replace(layouts.SHAPE, **changes)
    with pytest.raises(ValueError, match=r'are of vit_layouts, another .*give --config.model.name=vit_layouts$'):
        weights.check_values(converted, other)


def test_a_second_head_starts_fresh_from_weights_of_one_head(tmp_path, monkeypatch, caplog):
    layouts.prepare(monkeypatch)
    config = layouts.config_of(model__distilled=True, model__one_head=True)
    one = models.config_from_flat(workdir.flat(config.to_dict()))
    weights.save(tmp_path, create(one).init(jax.random.key(0)), {'config': config.to_dict()})
    two = dataclasses.replace(one, one_head=False)
    weights.check_values(tmp_path, two)
    fresh = create(two).init(jax.random.key(1))
    found = weights.start_from(tmp_path, fresh, prefix=2, ema=False)
    np.testing.assert_array_equal(found['head_dist']['kernel'], fresh['head_dist']['kernel'])
    assert not np.array_equal(found['head']['kernel'], fresh['head']['kernel'])
    assert 'head_dist starts from random values' in caplog.text


def test_the_values_of_the_named_model_are_its_own_whether_recorded_or_not(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    config = layouts.config_of().to_dict()
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    added = [f'model.{name}' for name in NOT_IN_SHAPES]
    old = {key: value for key, value in workdir.flat(config).items() if key not in added}
    workdir.write_config(tmp_path, {'config': old})
    get_reducer = layouts.config_of(model__heads=2, model__norm_epsilon=1e-6, model__activation='gelu').to_dict()
    continuation.open_workdir(tmp_path, get_reducer, accept_changes=False)
    saved = workdir.saved_config(tmp_path)
    evaluation_config.merge(layouts.config_of(), saved, 'a')
    other = layouts.config_of(model__heads=4)
    with pytest.raises(ValueError, match=r'another model \(model.heads 2 -> 4\)'):
        continuation.open_workdir(tmp_path, other.to_dict(), accept_changes=True)
    with pytest.raises(ValueError, match=r'model.heads 2 there, 4 here'):
        evaluation_config.merge(other, saved, 'a')
