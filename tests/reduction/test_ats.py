"""ATS against a loop over the samples of each image; Top-K's counts."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.registry import get_reducer
from tests.helpers import tiny
from tests.helpers.merged_tokens import make_tokens
from tests.helpers.weights import random_params

ATS = get_reducer('ats')


def make_inputs(tokens, has_class_token=True, heads=2, seed=0):
    rng, (batch, n) = np.random.default_rng(seed), tokens.patch_ids.shape
    attention = rng.dirichlet(np.full(n, 0.3), (batch, heads))
    return types.SimpleNamespace(
        values=jnp.asarray(rng.normal(size=(batch, heads, n, 3)), jnp.float32), has_class_token=has_class_token,
        class_attention_per_head=jnp.asarray(attention, jnp.float32),
        importance=jnp.asarray(rng.dirichlet(np.ones(n), batch), jnp.float32))


def sample_in_a_loop(attention, values, keep, mask):
    """Returns the sampled tokens of one image. attention [H, N], values [H, N, d], mask [N]."""
    score = [mask[j] * sum(a[j] * np.linalg.norm(v[j]) for a, v in zip(attention, values)) for j in range(len(mask))]
    share, sampled = np.asarray(score) / sum(score), set()
    for k in range(1, keep + 1):
        total = 0.0
        for token, part in enumerate(share):
            total += part
            if total >= (2 * k - 1) / (2 * keep):
                sampled.add(token)
                break
    return sampled


@pytest.mark.parametrize('has_class_token', [True, False])
@pytest.mark.parametrize('keeps', [(1,), (5, 3), (8, 8, 4)], ids=str)
def test_ats_in_repeated_reductions_keeps_the_samples_of_a_loop(keeps, has_class_token):
    tokens = make_tokens(n=9).replace(size=None)
    for stage, keep in enumerate(keeps):
        inputs = make_inputs(tokens, has_class_token, seed=stage)
        output = jax.jit(lambda tokens, keep=keep, inputs=inputs: ATS.reduce(tokens, inputs, keep))(tokens)
        for image in range(3):
            attention = inputs.class_attention_per_head[image] if has_class_token else inputs.importance[None, image]
            attention = np.broadcast_to(np.asarray(attention, np.float64), inputs.values.shape[1:3])
            mask = np.ones(tokens.patch_ids.shape[1]) if tokens.mask is None else np.asarray(tokens.mask[image])
            sampled = sample_in_a_loop(attention, np.asarray(inputs.values[image], np.float64), keep, mask)
            used = np.asarray(output.mask[image]) > 0
            expected = {int(tokens.patch_ids[image, token]) for token in sampled}
            assert set(np.asarray(output.patch_ids[image])[used].tolist()) == expected and used.sum() == len(sampled)
            assert (np.asarray(output.patch_ids[image])[~used] == -1 - tokens.stage).all()
            of_sampled = {int(index) for index in output.token_of_patch[image] if index >= 0}
            assert of_sampled == set(np.flatnonzero(used).tolist())
        tokens = output.replace(stage=stage + 1)


def test_ats_in_a_model_ignores_the_activations_of_masked_slots():
    model = create(tiny.CONFIG)
    params, images = random_params(model), jnp.asarray(tiny.images(4), jnp.float32) / 255
    plan = make_plan(16, 2, tokens=(12, 8), reduce_at=(0, 1), reducer=ATS)
    intermediates = jax.jit(model.apply, static_argnums=2)(params, images, plan)[1]
    counts = [np.asarray(mask.sum(1)) for mask in intermediates['mask']]
    assert all((count >= 1).all() and (count <= keep).all() for count, keep in zip(counts, plan.tokens))
    assert (counts[1] <= counts[0]).all() and (counts[0] < 12).any()


def test_ats_of_one_dominant_token_keeps_it_alone():
    tokens = make_tokens(batch=1).replace(size=None)
    inputs = make_inputs(tokens)
    inputs.class_attention_per_head = jnp.zeros((1, 2, 9)).at[:, :, 4].set(1.0)
    output = ATS.reduce(tokens, inputs, 5)
    assert output.mask.tolist() == [[1, 0, 0, 0, 0]] and output.patch_ids[0, 0] == tokens.patch_ids[0, 4]


def test_topk_counts_patches_as_the_comparison_of_token_reducers():
    plan = make_plan(196, 12, rate=0.7, reducer=get_reducer('topk'))
    assert plan.tokens == (137, 96, 67) and not plan.fused
    assert make_plan(196, 12, rate=0.7, fuse=False).tokens == (138, 97, 68)
