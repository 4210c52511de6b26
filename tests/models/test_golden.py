"""Parity with the PyTorch EViT: recorded outputs in tests/golden, weights and images rebuilt from names."""

import dataclasses
import functools
import json
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.vit import from_torch, to_torch
from evit_jax.models import create, get_config
from evit_jax.reduction.plan import make_plan
from tests.helpers import golden_rule

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
MANIFEST = json.loads((GOLDEN / 'manifest.json').read_text())
CASES = {case['name']: case for case in MANIFEST['cases']}


@functools.cache
def reference_model(name):
    entry = MANIFEST['models'][name]
    weights = golden_rule.make_weights(entry['state_dict'])
    size, image_size = re.fullmatch(r'deit_(\w+)_(\d+)', name).groups()
    config = dataclasses.replace(get_config(f'deit_{size[0]}'), image_size=int(image_size))
    return create(config), from_torch(weights, config)


def images_of(case):
    images = golden_rule.make_images(case['image_name'], case['batch'], case['image_size'])
    assert zlib.crc32(images.tobytes()) == case['images_crc32']
    return jnp.asarray(images.transpose(0, 2, 3, 1))


def plan_of(case):
    tokens = [count for count in case.get('call_tokens', ()) if count is not None]
    return make_plan((case['image_size'] // 16) ** 2, 12, rate=case.get('call_keep_rate', case['base_keep_rate']),
                     tokens=tokens, reduce_at=case['drop_loc'], fuse=case['fuse'])


def in_reference_order(ours, theirs, rows):
    """Token rows of ours in the reference's order, each image by its patch ids: near ties may differ in rank."""
    order = [[list(mine).index(patch) for patch in wanted] for mine, wanted in zip(ours, theirs, strict=True)]
    return np.take_along_axis(np.asarray(rows), np.asarray(order).reshape(*theirs.shape, *(1,) * (rows.ndim - 2)), 1)


@pytest.mark.parametrize('name', CASES)
def test_same_tokens_and_logits_as_the_reference(name):
    case, want = CASES[name], np.load(GOLDEN / f'{name}.npz')
    model, params = reference_model(case['model'])
    plan = plan_of(case)
    logits, seen = jax.jit(model.apply, static_argnames='plan')(params, images_of(case), plan=plan)

    assert plan.counts == tuple(want['token_counts'])
    np.testing.assert_allclose(logits, want['logits'], rtol=0, atol=1e-4)
    entering = np.tile(np.arange(plan.patches), (case['batch'], 1))
    for stage, (kept, attention) in enumerate(zip(seen['kept'], seen['class_attention'], strict=True)):
        reference = want[f'kept_s{stage}'].astype(int)
        ours = np.asarray(kept)[:, :reference.shape[1]]
        assert [set(row) for row in ours] == [set(row) for row in reference]
        aligned = in_reference_order(np.asarray(seen['patch_ids'][stage]), entering, attention)
        np.testing.assert_allclose(aligned, want[f'cls_attn_s{stage}'], rtol=0, atol=1e-4)
        fused = np.full((case['batch'], int(case['fuse'])), -1 - stage)
        np.testing.assert_array_equal(np.asarray(kept)[:, reference.shape[1]:], fused)
        entering = np.concatenate([reference, fused], axis=1)


@pytest.mark.parametrize('name', [name for name, case in CASES.items() if 'act_pos' in case['arrays']])
def test_same_activations_as_the_reference(name):
    case, want = CASES[name], np.load(GOLDEN / f'{name}.npz')
    model, params = reference_model(case['model'])
    _, seen = jax.jit(model.apply, static_argnames=('plan', 'patch_tokens'))(
        params, images_of(case), plan=plan_of(case), patch_tokens=True)

    patches = np.tile(np.arange(plan_of(case).patches), (case['batch'], 1))
    ours = theirs = patches
    stage = 0
    for key in [key for key in want.files if key.startswith('act_')]:
        got = np.asarray(seen[key.removeprefix('act_')])[..., :8]
        block = re.fullmatch(r'act_block(\d+)', key)
        if block and int(block[1]) in plan_of(case).reductions:
            fused = np.full((case['batch'], int(case['fuse'])), -1 - stage)
            ours = np.asarray(seen['kept'][stage])
            theirs = np.concatenate([want[f'kept_s{stage}'].astype(int), fused], axis=1)
            stage += 1
        prefix = got.shape[1] - ours.shape[1]
        aligned = np.concatenate([got[:, :prefix], in_reference_order(ours, theirs, got[:, prefix:])], axis=1)
        np.testing.assert_allclose(aligned, want[key], rtol=0, atol=1e-4, err_msg=key)


def test_same_loss_and_gradients_as_the_reference():
    name = 'evit_tiny_224_k70_fuse_grad'
    case, want = CASES[name], np.load(GOLDEN / f'{name}.npz')
    model, params = reference_model(case['model'])

    def loss_of(params):
        log_p = jax.nn.log_softmax(model.apply(params, images_of(case), plan_of(case))[0])
        return -jnp.mean(log_p[jnp.arange(case['batch']), jnp.asarray(case['labels'])])

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    gradient = to_torch(gradient, model.config)
    np.testing.assert_allclose(loss, case['loss'], rtol=1e-3)
    assert gradient.keys() == case['grad_norms'].keys()
    for key, norm in case['grad_norms'].items():
        np.testing.assert_allclose(np.linalg.norm(gradient[key]), norm, rtol=1e-3, err_msg=key)
        if f'grad8/{key}' in want:
            np.testing.assert_allclose(gradient[key].ravel()[:8], want[f'grad8/{key}'], rtol=5e-3, atol=1e-4 * norm,
                                       err_msg=key)


@pytest.mark.parametrize('name', MANIFEST['models'])
def test_conversion_round_trip_is_exact(name):
    model, params = reference_model(name)
    entry = MANIFEST['models'][name]
    back = to_torch(params, model.config)
    assert sum(value.size for value in back.values()) == entry['num_params'] == model.config.parameters()
    for key, value in golden_rule.make_weights(entry['state_dict']).items():
        np.testing.assert_array_equal(back.pop(key), value, err_msg=key)
    assert not back


def test_weights_that_do_not_fit_are_listed():
    config = get_config('deit_t')
    weights = golden_rule.make_weights(MANIFEST['models']['deit_tiny_224']['state_dict'])
    weights['head.bias'] = np.zeros(7, np.float32)
    weights['extra'] = weights.pop('norm.bias')
    with pytest.raises(ValueError, match=r'3 problems.*head\.bias has shape \(7,\), wanted \(1000,\); '
                                         r'missing norm\.bias; unknown extra'):
        from_torch(weights, config)
