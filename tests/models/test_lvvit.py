"""LV-ViT: parity with the PyTorch one, its cost and size, its heads under reductions, and MixToken."""

import dataclasses
import functools
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.vit import from_torch, to_torch
from evit_jax.models import create, get_config, layers
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction import reducers
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducer import Modules
from tests.helpers import golden_rule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MANIFEST = json.loads((GOLDEN / 'lvvit.json').read_text())
TINY = LVViTConfig(image_size=16, patch_size=4, width=8, depth=3, heads=2, classes=5, stem_width=4)


@functools.cache
def reference():
    """The reference's case, its weights, and what our model makes of them."""
    case, entry = MANIFEST['cases'][0], MANIFEST['models']['lvvit_s_224']
    weights, config = golden_rule.make_weights(entry['state_dict']), get_config('lvvit_s')
    images = golden_rule.make_images(case['image_name'], case['batch'], case['image_size'])
    assert zlib.crc32(images.tobytes()) == case['images_crc32']
    params, plan = from_torch(weights, config), make_plan(196, config.depth, reduce_at=config.default_reduce_at)
    out = jax.jit(create(config).apply, static_argnums=2)(params, jnp.asarray(images.transpose(0, 2, 3, 1)), plan)
    return np.load(GOLDEN / case['file']), weights, params, out


@functools.cache
def tiny_model(dtype=jnp.float32, config=TINY, **options):
    """A jitted model and parameters none of which is zero."""
    model, rng = create(config, dtype=dtype, **options), np.random.default_rng(1)

    def values(path, leaf):
        drawn = rng.normal(size=leaf.shape, scale=0.3).astype(leaf.dtype)
        return abs(drawn) if path[-1].key == 'var' else drawn

    params = jax.tree_util.tree_map_with_path(values, jax.eval_shape(model.init, jax.random.key(0)))
    return jax.jit(model.apply, static_argnums=2), params


def make_images(batch=4):
    return jnp.asarray(np.random.default_rng(0).normal(size=(batch, 16, 16, 3)), jnp.float32)


def tokens_best(params, seen, patches_only=True):
    """The largest token logits by class, from the last norm, one image at a time."""
    best = []
    for tokens, ids in zip(np.asarray(seen['norm'])[:, 1:], np.asarray(seen['token_patch'])):
        of = tokens @ params['aux_head']['kernel'] + params['aux_head']['bias']
        best.append(of[ids >= 0].max(0) if patches_only else of.max(0))
    return np.array(best)


def test_same_logits_as_the_reference():
    want, _, _, (logits, seen) = reference()
    np.testing.assert_allclose(seen['cls_logits'], want['cls_logits'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(seen['token_logits'].max(1), want['aux_max'], rtol=0, atol=1e-4)
    np.testing.assert_allclose(seen['token_logits'][..., :8], want['aux_first8'], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(seen['token_logits'][..., :8].argmax(1), want['aux_argmax_first8'])
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-4)


@pytest.mark.parametrize('name', ['patch_embed', 'block00', 'block07', 'block15', 'norm'])
def test_same_activations_as_the_reference(name):
    want, _, _, (_, seen) = reference()
    np.testing.assert_allclose(seen[name][..., :8], want[f'act_{name}'], rtol=0, atol=1e-4)


def test_conversion_round_trip_is_exact():
    _, weights, params, _ = reference()
    back = to_torch(params, get_config('lvvit_s'))
    assert back.keys() == weights.keys()
    for key, value in weights.items():
        assert back[key].dtype == value.dtype
        np.testing.assert_array_equal(back[key], value, err_msg=key)


@pytest.mark.parametrize('name, size, count', [
    ('lvvit_s', 224, 26_151_824), ('lvvit_s', 384, 26_297_744), ('lvvit_s', 448, 26_377_616),
    ('lvvit_t', 224, None), ('lvvit_m', 224, None)])
def test_parameters_are_those_of_the_reference(name, size, count):
    config = dataclasses.replace(get_config(name), image_size=size)
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(create(config).init, jax.random.key(0)))
    learnt = sum(leaf.size for path, leaf in leaves if path[-1].key not in ('mean', 'var'))
    assert config.parameters() == learnt == (count or learnt)


@pytest.mark.parametrize('size, rate, macs', [
    (224, 1.0, 6.55), (224, 0.7, 4.71), (224, 0.5, 3.88), (448, 1.0, 31.8), (448, 0.7, 21.5), (384, 1.0, 21.9),
    (240, 0.9, 6.8), (256, 0.8, 6.9), (256, 0.7, 6.2), (272, 0.7, 7.1), (304, 0.5, 7.4)])
def test_macs_are_those_of_the_paper(size, rate, macs):
    config = dataclasses.replace(get_config('lvvit_s'), image_size=size)
    plan = make_plan(config.patches(size), config.depth, rate=rate, reduce_at=config.default_reduce_at)
    assert config.macs(plan) / 1e9 == pytest.approx(macs, abs=0.006 if size == 224 else 0.06)


@pytest.mark.parametrize('name, blocks', [('lvvit_t', (3, 6, 9)), ('lvvit_s', (4, 8, 12)), ('lvvit_m', (5, 10, 15)),
                                          ('deit_s', (3, 6, 9))])
def test_reductions_stand_at_the_quarters(name, blocks):
    assert get_config(name).default_reduce_at == blocks


@pytest.mark.parametrize('fuse', [True, False], ids=['fused', 'dropped'])
def test_patches_that_are_left_add_half_their_largest_logits(fuse):
    apply, params = tiny_model()
    plan = make_plan(16, 3, tokens=(6, 3), reduce_at=(0, 2), fuse=fuse)
    logits, seen = apply(params, make_images(), plan)
    assert seen['token_logits'].shape == (4, plan.counts[-1], 5)
    np.testing.assert_array_equal(seen['token_patch'], seen['kept'][-1])
    cls = seen['norm'][:, 0] @ params['head']['kernel'] + params['head']['bias']
    np.testing.assert_allclose(logits, cls + tokens_best(params, seen) / 2, rtol=1e-5, atol=1e-5)


def test_a_fused_token_is_not_asked():
    apply, params = tiny_model()
    plan, differ = make_plan(16, 3, tokens=(3, 2), reduce_at=(0, 2)), False
    for seed in range(8):
        images = jnp.asarray(np.random.default_rng(seed).normal(size=(4, 16, 16, 3)), jnp.float32)
        logits, seen = apply(params, images, plan)
        best = np.asarray(logits - seen['cls_logits']) * 2
        np.testing.assert_allclose(best, tokens_best(params, seen), rtol=1e-4, atol=1e-5)
        differ |= np.abs(best - tokens_best(params, seen, patches_only=False)).max() > 1e-3
    assert differ  # a fused token would have said more


def test_where_only_fused_tokens_are_left_the_class_token_answers_alone():
    apply, params = tiny_model()
    plan = make_plan(16, 3, tokens=(1, 1, 1), reduce_at=(0, 1, 2), reducer=reducers.RANDOM)
    logits, seen = apply(params, make_images(16), plan)
    alone = np.asarray(seen['token_patch'] < 0).all(1)
    assert alone.any() and not alone.all() and np.isfinite(logits).all()
    np.testing.assert_array_equal(logits[alone], seen['cls_logits'][alone])
    assert (logits[~alone] != seen['cls_logits'][~alone]).any(1).all()


@pytest.mark.parametrize('reducer', [reducers.TOME, reducers.POOL, reducers.DYNAMICVIT], ids=str)
def test_tokens_of_other_reducers_are_asked_all(reducer):
    apply, params = tiny_model(modules=Modules(reducers.DYNAMICVIT, 2))
    plan = make_plan(16, 3, rate=(0.7, 0.6), reduce_at=(0, 2), reducer=reducer)
    logits, seen = apply(params, make_images(), plan)
    assert (seen['token_patch'] >= 0).all() and plan.counts[-1] == seen['token_logits'].shape[1] < 16
    np.testing.assert_allclose(logits, seen['cls_logits'] + seen['token_logits'].max(1) / 2, rtol=1e-5)


def test_tokens_that_are_masked_in_training_are_not_asked():
    apply, params = tiny_model(modules=Modules(reducers.DYNAMICVIT, 2))
    plan = make_plan(16, 3, rate=(0.7, 0.6), reduce_at=(0, 2), reducer=reducers.DYNAMICVIT).in_training()
    logits, seen = apply(params, make_images(), plan, jax.random.key(3))
    mask = np.asarray(seen['mask'][-1]) > 0
    assert mask.any(1).all() and not mask.all() and mask.shape == (4, 16)
    most = np.where(mask[..., None], seen['token_logits'], -np.inf).max(1)
    np.testing.assert_allclose(logits, seen['cls_logits'] + most / 2, rtol=1e-5)
    assert np.abs(most - seen['token_logits'].max(1)).max() > 1e-3


def test_branches_are_scaled():
    config = dataclasses.replace(TINY, residual_scale=0.0)
    apply, params = tiny_model(config=config)
    _, seen = apply(params, make_images(), make_plan(16, 3, reduce_at=()))
    np.testing.assert_array_equal(seen['block02'], seen['pos'])


def test_bfloat16_model_answers_in_float32():
    apply, params = tiny_model(jnp.bfloat16)
    logits, seen = apply(params, make_images(), make_plan(16, 3, rate=0.5, reduce_at=(1,)))
    assert seen['patch_embed'].dtype == seen['block02'].dtype == jnp.bfloat16
    assert logits.dtype == seen['token_logits'].dtype == jnp.float32


@pytest.mark.parametrize('wrong', [{'distilled': True}, {'stem': (4,)}, {'patch_size': 3, 'image_size': 9}])
def test_what_an_lvvit_has_not_is_an_error(wrong):
    with pytest.raises(ValueError, match='an LV-ViT has no distillation token'):
        dataclasses.replace(TINY, **wrong)


@pytest.mark.parametrize('config', [TINY, ViTConfig(image_size=16, patch_size=4, width=8, depth=3, heads=2, classes=5)],
                         ids=['lvvit', 'deit'])
def test_swapped_patches_come_from_the_mirror_image_of_the_group(config):
    apply, params = tiny_model(config=config)
    images, plan = make_images(6), make_plan(16, 3, reduce_at=())
    swap = np.random.default_rng(3).random((2, 16)) < 0.5
    _, plain = apply(params, images, plan)
    _, mixed = apply(params, images, plan, swap=jnp.asarray(swap))
    assert swap.any() and not swap.all()
    for row, partner in enumerate([2, 1, 0, 5, 4, 3]):
        tokens = np.where(swap[row // 3, :, None], plain['pos'][partner, 1:], plain['pos'][row, 1:])
        np.testing.assert_array_equal(mixed['pos'][row, 1:], tokens)
        np.testing.assert_array_equal(mixed['pos'][row, 0], plain['pos'][row, 0])


def test_one_swap_is_for_the_whole_batch():
    x = jnp.arange(4.0)[:, None, None] * jnp.ones((4, 3, 2))
    got = layers.swap_patches(x, jnp.array([True, False, True]))
    np.testing.assert_array_equal(got[..., 0], [[3, 0, 3], [2, 1, 2], [1, 2, 1], [0, 3, 0]])
