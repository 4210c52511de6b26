"""Parity with the PyTorch EViT, by reference cases in tests/golden."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.interchange.torch_weights import from_torch, to_torch
from evit_jax.models import get_config
from evit_jax.reduction.plan import make_plan
from tests.helpers import golden

CASES = golden.cases()
MODELS = golden.manifest()['models']
# The fast suite has all cases of the smallest model, and one case of each other size, with the smaller image sizes.
SLOW = ('evit_base_224_k50_nofuse', 'deit_base_224', 'evit_small_224_k50_fuse', 'evit_small_224_k70_nofuse',
        'evit_small_224_k50_nofuse', 'evit_small_224_k90_nofuse', 'evit_small_224_k90_fuse',
        'evit_small_224_k100_dense', 'evit_small_288_k70_nofuse', 'evit_small_interp224to304_k70_nofuse')


def parameters(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


def plan_of(case):
    tokens = [count for count in case.get('call_tokens', ()) if count is not None]
    return make_plan((case['image_size'] // 16) ** 2, 12, rate=case.get('call_keep_rate', case['base_keep_rate']),
                     tokens=tokens, reduce_at=case['drop_loc'], fuse=case['fuse'])


def in_reference_order(ids, reference_ids, rows):
    """Sorts the token rows of each image by the patch ids of the reference, since near ties may differ in rank."""
    order = [[list(ours).index(patch) for patch in theirs] for ours, theirs in zip(ids, reference_ids, strict=True)]
    index = np.asarray(order).reshape(*reference_ids.shape, *(1,) * (rows.ndim - 2))
    return np.take_along_axis(np.asarray(rows), index, 1)


@pytest.mark.parametrize('name', parameters(CASES))
def test_evit_on_reference_images_keeps_the_same_tokens_and_gives_the_same_logits(name):
    case, expected = CASES[name], golden.outputs(CASES[name])
    model, params = golden.deit(case['model'])
    plan = plan_of(case)
    logits, intermediates = jax.jit(model.apply, static_argnames='plan')(params, golden.make_images(case), plan=plan)

    assert plan.counts == tuple(expected['token_counts'])
    np.testing.assert_allclose(logits, expected['logits'], rtol=0, atol=1e-4)
    entering = np.tile(np.arange(plan.patches), (case['batch'], 1))
    reductions = zip(intermediates['kept'], intermediates['class_attention'], strict=True)
    for stage, (kept, attention) in enumerate(reductions):
        reference = expected[f'kept_s{stage}'].astype(int)
        ours = np.asarray(kept)[:, :reference.shape[1]]
        assert [set(row) for row in ours] == [set(row) for row in reference]
        aligned = in_reference_order(np.asarray(intermediates['patch_ids'][stage]), entering, attention)
        np.testing.assert_allclose(aligned, expected[f'cls_attn_s{stage}'], rtol=0, atol=1e-4)
        fused = np.full((case['batch'], int(case['fuse'])), -1 - stage)
        np.testing.assert_array_equal(np.asarray(kept)[:, reference.shape[1]:], fused)
        entering = np.concatenate([reference, fused], axis=1)


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (not name.startswith('evit_tiny_224_k70')))
    for name, case in CASES.items() if 'act_pos' in case['arrays']])
def test_evit_on_reference_images_has_the_same_activations(name):
    case, expected = CASES[name], golden.outputs(CASES[name])
    model, params = golden.deit(case['model'])
    plan = plan_of(case)
    _, intermediates = jax.jit(model.apply, static_argnames=('plan', 'patch_tokens'))(
        params, golden.make_images(case), plan=plan, patch_tokens=True)

    ids = reference_ids = np.tile(np.arange(plan.patches), (case['batch'], 1))
    stage = 0
    for key in [key for key in expected.files if key.startswith('act_')]:
        activations = np.asarray(intermediates[key.removeprefix('act_')])[..., :8]
        block = re.fullmatch(r'act_block(\d+)', key)
        if block and int(block[1]) in plan.reductions:
            fused = np.full((case['batch'], int(case['fuse'])), -1 - stage)
            ids = np.asarray(intermediates['kept'][stage])
            reference_ids = np.concatenate([expected[f'kept_s{stage}'].astype(int), fused], axis=1)
            stage += 1
        prefix = activations.shape[1] - ids.shape[1]
        aligned = np.concatenate(
            [activations[:, :prefix], in_reference_order(ids, reference_ids, activations[:, prefix:])], axis=1)
        np.testing.assert_allclose(aligned, expected[key], rtol=0, atol=1e-4, err_msg=key)


def test_evit_in_training_has_the_loss_and_gradients_of_the_reference():
    case = CASES['evit_tiny_224_k70_fuse_grad']
    expected = golden.outputs(case)
    model, params = golden.deit(case['model'])

    def loss_of(params):
        log_p = jax.nn.log_softmax(model.apply(params, golden.make_images(case), plan_of(case))[0])
        return -jnp.mean(log_p[jnp.arange(case['batch']), jnp.asarray(case['labels'])])

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    gradient = to_torch(gradient, model.config)
    np.testing.assert_allclose(loss, case['loss'], rtol=1e-3)
    assert gradient.keys() == case['grad_norms'].keys()
    for key, norm in case['grad_norms'].items():
        np.testing.assert_allclose(np.linalg.norm(gradient[key]), norm, rtol=1e-3, err_msg=key)
        if f'grad8/{key}' in expected:
            np.testing.assert_allclose(gradient[key].ravel()[:8], expected[f'grad8/{key}'], rtol=5e-3,
                                       atol=1e-4 * norm, err_msg=key)


@pytest.mark.parametrize('name', parameters(MODELS))
def test_to_torch_after_from_torch_returns_the_same_weights(name):
    model, params = golden.deit(name)
    weights = to_torch(params, model.config)
    assert sum(value.size for value in weights.values()) == MODELS[name]['num_params'] == model.config.parameters()
    for key, value in golden.make_weights(name).items():
        np.testing.assert_array_equal(weights.pop(key), value, err_msg=key)
    assert not weights


def test_from_torch_with_weights_that_do_not_fit_lists_all_problems():
    weights = golden.make_weights('deit_tiny_224')
    weights['head.bias'] = np.zeros(7, np.float32)
    weights['extra'] = weights.pop('norm.bias')
    with pytest.raises(ValueError, match=r'3 problems.*head\.bias has shape \(7,\), wanted \(1000,\); '
                                         r'missing norm\.bias; unknown extra'):
        from_torch(weights, get_config('deit_t'))
