"""LV-ViT: parity with the PyTorch model, MACs, parameters, heads under reductions, and MixToken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.torch_weights import from_torch, to_torch
from evit_jax.models import create, embedding, get_config
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction import reducers
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Modules
from tests.helpers import golden

TINY = LVViTConfig(image_size=16, patch_size=4, width=8, depth=3, heads=2, classes=5, stem_width=4)


@functools.cache
def reference():
    """Returns the recorded outputs, the PyTorch weights, our parameters, and our logits and intermediates."""
    case, = golden.cases('lvvit.json').values()
    weights, config = golden.make_weights('lvvit_s_224', 'lvvit.json'), get_config('lvvit_s')
    params, plan = from_torch(weights, config), make_plan(196, config.depth, reduce_at=config.default_reduce_at)
    logits, intermediates = jax.jit(create(config).apply, static_argnums=2)(params, golden.make_images(case), plan)
    return golden.outputs(case), weights, params, logits, intermediates


@functools.cache
def tiny_model(dtype=jnp.float32, config=TINY, **options):
    """Returns a jitted model, and parameters of which none is zero."""
    model, rng = create(config, dtype=dtype, **options), np.random.default_rng(1)

    def values(path, leaf):
        drawn = rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)
        return abs(drawn) if path[-1].key == 'var' else drawn

    params = jax.tree_util.tree_map_with_path(values, jax.eval_shape(model.init, jax.random.key(0)))
    return jax.jit(model.apply, static_argnums=2), params


def make_images(batch=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 16, 3)), jnp.float32)


def largest_token_logits(params, intermediates, with_fused=False):
    """Computes the largest token logit of each class from the output of the last norm, image by image."""
    largest = []
    for tokens, ids in zip(np.asarray(intermediates['norm'])[:, 1:], np.asarray(intermediates['token_patch'])):
        token_logits = tokens @ params['aux_head']['kernel'] + params['aux_head']['bias']
        largest.append(token_logits.max(0) if with_fused else token_logits[ids >= 0].max(0))
    return np.array(largest)


def test_lvvit_on_reference_images_gives_the_same_logits():
    expected, _, _, logits, intermediates = reference()
    np.testing.assert_allclose(intermediates['cls_logits'], expected['cls_logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(intermediates['token_logits'].max(1), expected['aux_max'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(intermediates['token_logits'][..., :8], expected['aux_first8'], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(intermediates['token_logits'][..., :8].argmax(1), expected['aux_argmax_first8'])
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['patch_embed', 'block00', 'block07', 'block15', 'norm'])
def test_lvvit_on_reference_images_has_the_same_activations(name):
    expected, _, _, _, intermediates = reference()
    np.testing.assert_allclose(intermediates[name][..., :8], expected[f'act_{name}'], rtol=0, atol=1e-4)


def test_to_torch_after_from_torch_returns_the_same_weights():
    _, weights, params, *_ = reference()
    converted = to_torch(params, get_config('lvvit_s'))
    assert converted.keys() == weights.keys()
    for key, value in weights.items():
        assert converted[key].dtype == value.dtype
        np.testing.assert_array_equal(converted[key], value, err_msg=key)


@pytest.mark.parametrize('name, size, count', [
    ('lvvit_s', 224, 26_151_824), ('lvvit_s', 384, 26_297_744), ('lvvit_s', 448, 26_377_616),
    ('lvvit_t', 224, None), ('lvvit_m', 224, None)])
def test_parameters_of_lvvit_are_those_of_the_reference(name, size, count):
    config = dataclasses.replace(get_config(name), image_size=size)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(create(config).init, jax.random.key(0)))
    learnt = sum(leaf.size for path, leaf in leaves if path[-1].key not in ('mean', 'var'))
    assert config.parameters() == learnt == (count or learnt)


@pytest.mark.parametrize('size, rate, macs', [
    (224, 1.0, 6.55), (224, 0.7, 4.71), (224, 0.5, 3.88), (448, 1.0, 31.8), (448, 0.7, 21.5), (384, 1.0, 21.9),
    (240, 0.9, 6.8), (256, 0.8, 6.9), (256, 0.7, 6.2), (272, 0.7, 7.1), (304, 0.5, 7.4)])
def test_macs_of_lvvit_s_are_those_of_the_paper(size, rate, macs):
    config = dataclasses.replace(get_config('lvvit_s'), image_size=size)
    plan = make_plan(config.patches(size), config.depth, rate=rate, reduce_at=config.default_reduce_at)
    assert config.macs(plan) / 1e9 == pytest.approx(macs, abs=0.006 if size == 224 else 0.06)


@pytest.mark.parametrize('name, blocks', [('lvvit_t', (3, 6, 9)), ('lvvit_s', (4, 8, 12)), ('lvvit_m', (5, 10, 15)),
                                          ('deit_s', (3, 6, 9))])
def test_default_reduce_at_divides_the_depth_into_quarters(name, blocks):
    assert get_config(name).default_reduce_at == blocks


@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
def test_logits_with_a_plan_add_half_the_largest_logits_of_the_kept_patches(fuse):
    apply, params = tiny_model()
    plan = make_plan(16, 3, tokens=(6, 3), reduce_at=(0, 2), fuse=fuse)
    logits, intermediates = apply(params, make_images(), plan)
    assert intermediates['token_logits'].shape == (4, plan.counts[-1], 5)
    np.testing.assert_array_equal(intermediates['token_patch'], intermediates['kept'][-1])
    cls = intermediates['norm'][:, 0] @ params['head']['kernel'] + params['head']['bias']
    np.testing.assert_allclose(logits, cls + largest_token_logits(params, intermediates) / 2, rtol=1e-5, atol=1e-5)


def test_logits_with_a_fused_token_do_not_read_its_token_logits():
    apply, params = tiny_model()
    plan, differs = make_plan(16, 3, tokens=(3, 2), reduce_at=(0, 2)), False
    for seed in range(8):
        images = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 16, 16, 3)), jnp.float32)
        logits, intermediates = apply(params, images, plan)
        largest = np.asarray(logits - intermediates['cls_logits']) * 2
        np.testing.assert_allclose(largest, largest_token_logits(params, intermediates), rtol=1e-4, atol=1e-5)
        differs |= np.abs(largest - largest_token_logits(params, intermediates, with_fused=True)).max() > 1e-3
    assert differs  # the largest logit of some class is that of a fused token


def test_logits_with_only_fused_tokens_left_are_those_of_the_class_token():
    apply, params = tiny_model()
    plan = make_plan(16, 3, tokens=(1, 1, 1), reduce_at=(0, 1, 2), reducer=reducers.RANDOM)
    logits, intermediates = apply(params, make_images(16), plan)
    only_fused = np.asarray(intermediates['token_patch'] < 0).all(1)
    assert only_fused.any() and not only_fused.all() and np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[only_fused], intermediates['cls_logits'][only_fused])
    assert (logits[~only_fused] != intermediates['cls_logits'][~only_fused]).any(1).all()


@pytest.mark.parametrize('reducer', [reducers.TOME, reducers.POOL, reducers.DYNAMICVIT], ids=str)
def test_logits_with_a_reducer_that_fuses_nothing_read_all_token_logits(reducer):
    apply, params = tiny_model(modules=Modules(reducers.DYNAMICVIT, 2))
    plan = make_plan(16, 3, rate=(0.7, 0.6), reduce_at=(0, 2), reducer=reducer)
    logits, intermediates = apply(params, make_images(), plan)
    assert (intermediates['token_patch'] >= 0).all() and plan.counts[-1] == intermediates['token_logits'].shape[1] < 16
    expected = intermediates['cls_logits'] + intermediates['token_logits'].max(1) / 2
    np.testing.assert_allclose(logits, expected, rtol=1e-5)


def test_logits_in_training_do_not_read_masked_tokens():
    apply, params = tiny_model(modules=Modules(reducers.DYNAMICVIT, 2))
    plan = make_plan(16, 3, rate=(0.7, 0.6), reduce_at=(0, 2), reducer=reducers.DYNAMICVIT).in_training()
    logits, intermediates = apply(params, make_images(), plan, jax.random.key(3))
    mask = np.asarray(intermediates['mask'][-1]) > 0
    assert mask.any(1).all() and not mask.all() and mask.shape == (4, 16)
    largest = np.where(mask[..., None], intermediates['token_logits'], -np.inf).max(1)
    np.testing.assert_allclose(logits, intermediates['cls_logits'] + largest / 2, rtol=1e-5)
    assert np.abs(largest - intermediates['token_logits'].max(1)).max() > 1e-3


def test_residual_scale_of_0_leaves_the_tokens_unchanged():
    config = dataclasses.replace(TINY, residual_scale=0.0)
    apply, params = tiny_model(config=config)
    _, intermediates = apply(params, make_images(), make_plan(16, 3, reduce_at=()))
    np.testing.assert_array_equal(intermediates['block02'], intermediates['pos'])


def test_bfloat16_model_returns_float32_logits():
    apply, params = tiny_model(jnp.bfloat16)
    logits, intermediates = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    assert intermediates['patch_embed'].dtype == intermediates['block02'].dtype == jnp.bfloat16
    assert logits.dtype == intermediates['token_logits'].dtype == jnp.float32


@pytest.mark.parametrize('wrong', [{'distilled': True}, {'stem': (4,)}, {'patch_size': 3, 'image_size': 9}])
def test_lvvit_config_with_an_unsupported_field_raises(wrong):
    with pytest.raises(ValueError, match='an LV-ViT has no distillation token'):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize('config', [TINY, ViTConfig(image_size=16, patch_size=4, width=8, depth=3, heads=2, classes=5)],
                         ids=['lvvit', 'deit'])
def test_swap_takes_patches_from_the_mirror_image_of_the_group(config):
    apply, params = tiny_model(config=config)
    images, plan = make_images(6), make_plan(16, 3, reduce_at=())
    swap = np.random.default_rng(3).random((2, 16)) < 0.5
    _, unmixed = apply(params, images, plan)
    _, mixed = apply(params, images, plan, swap=jnp.asarray(swap))
    assert swap.any() and not swap.all()
    for row, partner in enumerate([2, 1, 0, 5, 4, 3]):
        tokens = np.where(swap[row // 3, :, None], unmixed['pos'][partner, 1:], unmixed['pos'][row, 1:])
        np.testing.assert_array_equal(mixed['pos'][row, 1:], tokens)
        np.testing.assert_array_equal(mixed['pos'][row, 0], unmixed['pos'][row, 0])


def test_swap_patches_with_one_row_swaps_in_the_whole_batch():
    x = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 3, 2))
    got = embedding.swap_patches(x, jnp.array([True, False, True]))
    np.testing.assert_array_equal(got[..., 0], [[3, 0, 3], [2, 1, 2], [1, 2, 1], [0, 3, 0]])
