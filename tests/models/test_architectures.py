"""Fields of ViTConfig for other families than DeiT: what they add to the forward pass, under token plans too."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.kernels.rope import grid_coordinates
from evit_jax.models import create
from evit_jax.models.config import ViTConfig, as_hw, as_size
from evit_jax.models.positions import POSITION_RESIZES, resize_positions
from evit_jax.reduction.apply import Reductions
from evit_jax.reduction.inputs import ModelInputs
from evit_jax.reduction.plan import make_plan, merge_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.reduction.tokens import Tokens

BASE = ViTConfig(image_size=24, patch_size=4, width=16, depth=3, heads=2, classes=5)
FAMILIES = {
    'deit3': {'prefix_positions': 0, 'layer_scale': 1e-4},
    'registers': {'registers': 4, 'prefix_positions': 1, 'layer_scale': 1.0, 'pooling': 'token_avg'},
    'clip': {'pre_norm': True, 'patch_bias': False, 'activation': 'quick_gelu', 'projection': True,
             'head_bias': False},
    'siglip': {'class_token': False, 'pooling': 'map', 'activation': 'gelu_tanh', 'classes': 0},
    'mae': {'pooling': 'avg_fc_norm'},
    'gap': {'class_token': False, 'pooling': 'avg', 'qk_norm': True},
    'eva02': {'rope': 'eva', 'rope_grid': 4, 'k_bias': False, 'swiglu': True, 'mlp_norm': True, 'activation': 'silu',
              'mlp_ratio': 8 / 3, 'pooling': 'avg_fc_norm'},
    'dinov3': {'rope': 'dinov3', 'rope_base': 100.0, 'absolute_positions': False, 'registers': 4, 'layer_scale': 1e-5,
               'qkv_bias': False, 'classes': 0},
    'rectangle': {'image_size': (16, 24), 'position_resize': 'antialiased'},
}


@functools.cache
def build(family, **changes):
    """Returns a config, the jitted model, and parameters of which none is zero."""
    config = dataclasses.replace(BASE, **(FAMILIES.get(family, {}) | changes))
    model, rng = create(config), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype),
                          jax.eval_shape(model.init, jax.random.key(0)))
    return config, jax.jit(model.apply, static_argnums=2, static_argnames='patch_tokens'), params


def make_images(size, batch=2):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, *as_hw(size), 3)), jnp.float32)


def dense(config, image_size=None):
    return make_plan(config.patches(image_size or config.image_size), config.depth, reduce_at=())


@functools.cache
def dense_logits(family):
    config, apply, params = build(family)
    return apply(params, make_images(config.image_size), dense(config), patch_tokens=True)[0]


def reduced_plan(config, name):
    patches = config.patches(config.image_size)
    reducer = get_reducer(name)
    if reducer.merges:
        return merge_plan(patches, config.depth, r=4, reducer=reducer)
    return make_plan(patches, config.depth, rate=0.6, reduce_at=(1, 2), reducer=reducer)


@pytest.mark.parametrize('family', FAMILIES)
def test_config_of_a_family_counts_the_parameters_of_its_model(family):
    config, _, params = build(family)
    assert config.parameters() == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('family, reducer', [
    *itertools.product(FAMILIES, ('evit', 'tome')), ('siglip', 'evit:mean'), ('dinov3', 'pitome'),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(('siglip', 'dinov3'), (
        'evit:mean', 'evit:shift', 'random', 'pool', 'pitome', 'tofu', 'dpcknn', 'kmedoids', 'heuristic'))
      if case not in (('siglip', 'evit:mean'), ('dinov3', 'pitome')))])
def test_model_of_a_family_runs_under_a_reducer(family, reducer):
    config, apply, params = build(family)
    plan = reduced_plan(config, reducer)
    logits, intermediates = apply(params, make_images(config.image_size), plan, patch_tokens=True)
    assert logits.shape == (2, config.classes or config.head_width)
    assert np.isfinite(logits).all()
    assert intermediates['patch_tokens'].shape[1] == plan.counts[-1]
    assert len(intermediates['class_attention']) == (len(plan.reductions) if config.class_token else 0)
    assert not np.allclose(logits, dense_logits(family))


@pytest.mark.parametrize('family', ['eva02', 'dinov3'])
def test_rotary_positions_of_dropped_and_reordered_tokens_stay_with_the_tokens(family):
    """A model that drops nothing but reorders its patches computes the same features."""
    config, apply, params = build(family)
    images, plan = make_images(config.image_size), dense(config)
    patches = plan.patches
    order = jnp.asarray(np.stack([np.random.default_rng(s).permutation(patches) for s in range(2)]), jnp.int32)
    expected = apply(params, images, plan, patch_tokens=True)[1]
    reordered = apply(params, images, plan, visible=order, patch_tokens=True)[1]
    np.testing.assert_allclose(reordered['features'], expected['features'], atol=2e-5)
    tokens = np.take_along_axis(np.asarray(expected['patch_tokens']), np.asarray(order)[..., None], axis=1)
    np.testing.assert_allclose(reordered['patch_tokens'], tokens, atol=2e-5)


@pytest.mark.parametrize('family', ['eva02', 'dinov3'])
def test_rotary_positions_after_dropping_equal_those_of_the_kept_patches_as_input(family):
    """With a first block that adds nothing, dropping in it equals a model whose input is the kept patches."""
    config, apply, params = build(family)
    params = params | {'blocks': params['blocks'] | {0: jax.tree.map(np.zeros_like, params['blocks'][0])}}
    images, patches = make_images(config.image_size), config.patches(config.image_size)
    plan = make_plan(patches, 3, rate=0.5, reduce_at=(0,), reducer=get_reducer('evit:norm'), fuse=False)
    features, intermediates = apply(params, images, plan)[1]['features'], apply(params, images, plan)[1]
    kept = intermediates['kept'][0]
    expected = apply(params, images, make_plan(kept.shape[1], 3, reduce_at=()), visible=kept)[1]['features']
    np.testing.assert_allclose(features, expected, atol=2e-5)


def test_rotary_coordinates_of_merged_tokens_are_the_means_of_their_patches():
    coordinates = jnp.asarray(grid_coordinates('dinov3', 2, 3))
    reductions = Reductions(make_plan(6, 1, reduce_at=()), jnp.zeros(1), ModelInputs(coordinates=coordinates))
    tokens = Tokens(jnp.zeros((2, 4, 8)), jnp.zeros((2, 3), jnp.int32),
                    jnp.asarray([[0, 0, 2, 1, 2, 2], [-1, 0, 1, 2, -1, 2]]))
    after = reductions._mean_coordinates(tokens)
    for image, members in enumerate([([0, 1], [3], [2, 4, 5]), ([1], [2], [3, 5])]):
        means = [coordinates[np.array(ids)].mean(axis=0) for ids in members]
        np.testing.assert_allclose(after[image], means, rtol=1e-6)


def test_pooling_of_fused_tokens_counts_the_patches_in_them():
    config, apply, params = build('gap')
    plan = make_plan(config.patches(24), 3, rate=0.5, reduce_at=(1,))
    _, intermediates = apply(params, make_images(24), plan)
    tokens, index = np.asarray(intermediates['patch_tokens']), np.asarray(intermediates['token_of_patch'][-1])
    of_patches = np.take_along_axis(tokens, index[..., None], axis=1)
    np.testing.assert_allclose(intermediates['features'], of_patches.mean(axis=1), atol=1e-5)


def test_attention_pool_under_merging_counts_a_token_once_for_each_of_its_patches():
    config, apply, params = build('siglip')
    _, intermediates = apply(params, make_images(24), merge_plan(36, 3, r=6))
    tokens, index = np.asarray(intermediates['patch_tokens']), np.asarray(intermediates['token_of_patch'][-1])
    of_patches = np.take_along_axis(tokens, index[..., None], axis=1)
    model = create(dataclasses.replace(config, depth=0))
    pool = params['attn_pool']
    kv = of_patches @ pool['kv']['kernel'] + pool['kv']['bias']
    k, v = (part.reshape(2, 36, 2, 8) for part in np.split(kv, 2, axis=-1))
    q = (pool['latent'][0, 0] @ pool['q']['kernel'] + pool['q']['bias']).reshape(2, 8) / math.sqrt(8)
    weights = np.exp(np.einsum('hd,bnhd->bhn', q, k))
    weights /= weights.sum(axis=-1, keepdims=True)
    pooled = np.einsum('bhn,bnhd->bhd', weights, v).reshape(2, -1) @ pool['proj']['kernel'] + pool['proj']['bias']
    normed = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    hidden = (normed * pool['norm']['scale'] + pool['norm']['bias']) @ pool['mlp']['fc1']['kernel']
    hidden = np.asarray(jax.nn.gelu(hidden + pool['mlp']['fc1']['bias'], approximate=True))
    expected = pooled + hidden @ pool['mlp']['fc2']['kernel'] + pool['mlp']['fc2']['bias']
    np.testing.assert_allclose(intermediates['features'], expected, atol=1e-4)
    assert model.config.classes == 0


@pytest.mark.parametrize('name, alternative', [('evit:pool', 'evit:mean or evit'), ('ward:pool', 'ward:mean or ward')])
def test_plan_with_pool_importance_is_refused_for_a_model_without_an_attention_pool(name, alternative):
    config, apply, params = build('gap')
    plan = make_plan(config.patches(24), 3, rate=0.5, reduce_at=(1,), reducer=get_reducer(name))
    with pytest.raises(ValueError, match=f'has pooling=avg, not map: give {alternative}'):
        apply(params, make_images(24), plan)
    config.check_reducer(plan._replace(keep=(None,) * 3))
    dataclasses.replace(config, pooling='map').check_reducer(plan)


@pytest.mark.parametrize('method', POSITION_RESIZES)
@pytest.mark.parametrize('size', [32, (16, 40)])
def test_model_at_another_size_resizes_its_positions(method, size):
    config, apply, params = build('deit3', position_resize=method)
    logits, _ = apply(params, make_images(size), dense(config, size))
    assert np.isfinite(logits).all()


def test_antialiased_resize_to_a_smaller_grid_averages_more_positions_than_bicubic():
    antialiased, bicubic = (resize_positions(jnp.eye(16), (16, 1), (4, 1), method=method)
                            for method in ('antialiased', 'bicubic'))
    assert (antialiased != 0).sum(axis=1).min() > 4 >= (bicubic != 0).sum(axis=1).max()
    np.testing.assert_allclose(antialiased.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize('values, problem', [
    ({'class_token': False}, 'without a class token cannot have pooling=token'),
    ({'class_token': False, 'pooling': 'avg', 'distilled': True}, 'distilled'),
    ({'prefix_positions': 3}, r'prefix_positions=3 is outside \[0, 1\]'),
    ({'rope': 'eva', 'heads': 8}, 'needs a multiple of 4 channels in each head'),
    ({'rope': 'mixed'}, "rope='mixed' is unknown"), ({'mlp_norm': True}, 'is for a gated MLP'),
    ({'position_resize': 'nearest'}, "position_resize='nearest' is unknown"),
    ({'image_size': (24, 30)}, 'image size 30 in 24 x 30 is not divisible by the patch size 4: use 28 or 32')])
def test_config_with_contradicting_values_raises(values, problem):
    with pytest.raises(ValueError, match=problem):
        dataclasses.replace(BASE, **values)


def test_image_sizes_of_squares_are_ints():
    assert dataclasses.replace(BASE, image_size=(24, 24)) == BASE
    assert (as_hw(24), as_hw((16, 24)), as_size((8, 8)), as_size([8, 16])) == ((24, 24), (16, 24), 8, (8, 16))
    assert dataclasses.replace(BASE, image_size=(16, 24)).grid() == (4, 6)
