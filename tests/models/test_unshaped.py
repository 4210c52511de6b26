"""Config fields that change no parameter shape (heads, epsilon, activation, pooling), in models and in workdirs."""

import dataclasses

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import continuation, weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.models import NOT_IN_SHAPES, create
from evit_jax.models.config import POOLINGS, ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.reduction.reducers import DYNAMICVIT, EVIT, TOME
from evit_jax.training import evaluation_config
from tests.helpers import layouts
from tests.helpers.weights import random_params

CONFIG = ViTConfig(image_size=16, patch_size=4, width=8, depth=2, heads=2, classes=3, init_std=0.3)
IMAGES = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def config_with(**changes):
    return dataclasses.replace(CONFIG, **changes)


def run(config, plan, images=IMAGES, modules=NO_MODULES, **inputs):
    model = create(config, modules=modules)
    params = random_params(model)
    return params, *jax.jit(model.apply, static_argnums=2)(params, images, plan, **inputs)


def layer_norm(x, norm, epsilon=1e-6):
    x = np.asarray(x, np.float64)
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + epsilon) * norm['scale'] + norm['bias']


def head(params, x):
    return x @ params['head']['kernel'] + params['head']['bias']


@pytest.mark.parametrize('changes', [{'heads': 4}, {'norm_epsilon': 1e-2}, {'activation': 'quick_gelu'},
                                     {'activation': 'gelu_tanh'}, {'pooling': 'avg'}])
def test_unshaped_field_with_another_value_changes_the_logits(changes):
    plan, model = make_plan(16, 2, reduce_at=()), create(CONFIG)
    params = jax.tree.map(lambda leaf: 3 * leaf, random_params(model))  # large enough for the parts of GELU that differ
    logits = [jax.jit(create(config).apply, static_argnums=2)(params, IMAGES, plan)[0]
              for config in (CONFIG, config_with(**changes))]
    assert np.abs(logits[0] - logits[1]).max() > 1e-5


@pytest.mark.parametrize('pooling', ['avg', 'avg_fc_norm'])
def test_pooling_avg_gives_the_head_the_mean_of_the_patches(pooling):
    params, logits, intermediates = run(config_with(pooling=pooling), make_plan(16, 2, reduce_at=()))
    patches = np.asarray(intermediates['block01'], np.float64)[:, 1:]
    expected = (layer_norm(patches, params['norm']).mean(1) if pooling == 'avg' else
                layer_norm(patches.mean(1), params['fc_norm']))
    np.testing.assert_allclose(logits, head(params, expected), atol=1e-5)
    assert ('norm' in params) == (pooling == 'avg')


@pytest.mark.parametrize('reducer', [EVIT, TOME])
def test_pooling_avg_with_a_plan_weights_merged_and_fused_tokens_by_their_sizes(reducer):
    plan = make_plan(16, 2, rate=0.6, reduce_at=(0, 1), reducer=reducer)
    params, logits, intermediates = run(config_with(pooling='avg'), plan)
    tokens = layer_norm(intermediates['block01'], params['norm'])[:, 1:]
    weight = np.array([np.bincount(index, minlength=tokens.shape[1]) for index in intermediates['token_of_patch'][-1]])
    assert (weight > 1).any()
    assert weight.sum() == 2 * 16
    expected = (tokens * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    np.testing.assert_allclose(logits, head(params, expected), atol=1e-5)


def test_pooling_avg_with_a_mask_excludes_masked_tokens():
    plan = make_plan(16, 2, rate=0.5, reduce_at=(1,), reducer=DYNAMICVIT).in_training()
    params, logits, intermediates = run(config_with(pooling='avg'), plan, modules=Modules(DYNAMICVIT, 1),
                                        key=jax.random.key(1))
    mask = np.asarray(intermediates['mask'][-1])
    assert 0 < mask.sum() < mask.size
    tokens = layer_norm(intermediates['block01'], params['norm'])[:, 1:]
    expected = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    np.testing.assert_allclose(logits, head(params, expected), atol=1e-5)


@pytest.mark.parametrize('changes', [{'pooling': name} for name in POOLINGS] + [
    {'distilled': True}, {'distilled': True, 'one_head': True}])
def test_parameters_and_macs_with_other_heads_are_those_of_the_model(changes):
    config, plan = config_with(**changes), make_plan(16, 2, rate=0.5, reduce_at=(1,))
    leaves = jax.tree.leaves(jax.eval_shape(create(config).init, jax.random.key(0)))
    assert config.parameters() == sum(leaf.size for leaf in leaves)
    heads = (2 if config.distilled and not config.one_head else 1) * config.head_width * 3
    pool = 9 * 2 * 8 * 8 + 9 * 2 * 8 + 2 * 8 * 8 + 2 * 8 * 32 if config.pooling == 'map' else 0
    blocks = config.macs(plan) - 16 * 48 * 8 - heads - pool
    assert blocks == config_with(distilled=config.distilled).macs(plan) - 16 * 48 * 8 - (1 + config.distilled) * 8 * 3
    assert (config.executed_macs(plan) == config.macs(plan)) == (config.pooling != 'token')


@pytest.mark.parametrize('make_config, message', [
    (lambda: config_with(heads=3), 'a width of 8 cannot be divided among 3 heads: give one of 1, 2, 4, 8'),
    (lambda: config_with(heads=-2), 'among -2 heads'),
    (lambda: config_with(norm_epsilon=-1e-6), 'norm_epsilon=-1e-06 is outside'),
    (lambda: config_with(activation='relu'), "activation='relu' is unknown: there are gelu, "),
    (lambda: config_with(pooling='max'), "pooling='max' is unknown: there are token, "),
    (lambda: config_with(pooling='avg', distilled=True), 'reads no distillation token'),
    (lambda: config_with(one_head=True), 'give distilled=True'),
    (lambda: LVViTConfig(pooling='avg'), 'give pooling=token')])
def test_config_with_an_invalid_value_raises(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()


OTHER = {'model__heads': 4, 'model__norm_epsilon': 1e-3, 'model__activation': 'quick_gelu', 'model__pooling': 'avg'}


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A folder of weights whose unshaped fields differ from those of the named model."""
    layouts.prepare(monkeypatch)
    config = layouts.config_of(**OTHER).to_dict()
    params = random_params(create(models.config_from_flat(workdir.flat(config))))
    weights.save(tmp_path / 'other', params, {'config': config})
    return tmp_path / 'other'


def test_init_from_weights_with_other_unshaped_fields_raises(converted, tmp_path):
    with pytest.raises(ValueError, match=r'--config.model.heads=4 --config.model.norm_epsilon=0.001 --config.model.'
                                         r'activation=quick_gelu --config.model.pooling=avg'):
        layouts.train_here(tmp_path / 'run', init_from=str(converted))
    weights.check_values(converted, models.config_from_flat(workdir.flat(layouts.config_of(**OTHER).to_dict())))
    loaded = load_model(converted)
    assert [getattr(loaded.config, key) for key in NOT_IN_SHAPES] == [4, 1e-3, 'quick_gelu', 'avg', False]


@pytest.mark.parametrize('changes', [{'width': 32}, {'depth': 3}])
def test_check_values_with_another_shape_raises_and_names_the_model(converted, changes):
    other = dataclasses.replace(layouts.SHAPE, **changes)
    with pytest.raises(ValueError, match=r'are of vit_layouts, another .*give --config.model.name=vit_layouts$'):
        weights.check_values(converted, other)


def test_start_from_weights_of_one_head_initialises_the_second_head(tmp_path, monkeypatch, caplog):
    layouts.prepare(monkeypatch)
    config = layouts.config_of(model__distilled=True, model__one_head=True)
    one_head = models.config_from_flat(workdir.flat(config.to_dict()))
    weights.save(tmp_path, random_params(create(one_head)), {'config': config.to_dict()})
    two_heads = dataclasses.replace(one_head, one_head=False)
    weights.check_values(tmp_path, two_heads)
    fresh = random_params(create(two_heads), 1)
    params = weights.start_from(tmp_path, fresh, config=two_heads, ema=False)
    np.testing.assert_array_equal(params['head_dist']['kernel'], fresh['head_dist']['kernel'])
    assert not np.array_equal(params['head']['kernel'], fresh['head']['kernel'])
    assert 'head_dist starts from random values' in caplog.text


def test_unshaped_fields_that_an_old_workdir_does_not_record_are_those_of_the_named_model(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    config = layouts.config_of().to_dict()
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    added = [f'model.{name}' for name in NOT_IN_SHAPES]
    recorded = {key: value for key, value in workdir.flat(config).items() if key not in added}
    workdir.write_config(tmp_path, {'config': recorded})
    explicit = layouts.config_of(model__heads=2, model__norm_epsilon=1e-6, model__activation='gelu').to_dict()
    continuation.open_workdir(tmp_path, explicit, accept_changes=False)
    saved = workdir.saved_config(tmp_path)
    evaluation_config.merge(workdir.flat(layouts.config_of()), saved, 'a')
    other = layouts.config_of(model__heads=4)
    with pytest.raises(ValueError, match=r'another model \(model.heads 2 -> 4\)'):
        continuation.open_workdir(tmp_path, other.to_dict(), accept_changes=True)
    with pytest.raises(ValueError, match=r'model.heads 2 there, 4 here'):
        evaluation_config.merge(workdir.flat(other), saved, 'a')
