"""keep_top against loops, and its gather implementations against each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.models import create
from evit_jax.reduction.gather import GATHERS, keep_top
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.tokens import Tokens
from tests.helpers import layouts
from tests.helpers.weights import random_params


def keep(tokens, scores, keep, **fields):
    return keep_top(tokens.replace(**fields), scores, keep)


def keep_and_fuse(tokens, scores, keep, **fields):
    return keep_top(tokens.replace(**fields), scores, keep, fuse_weights=scores)


REDUCTIONS = {'kept': keep, 'fused': keep_and_fuse}
each_gather = pytest.mark.parametrize('gather_impl', [name for name in GATHERS if name != 'gather'])
each_reduction = pytest.mark.parametrize('reduce', REDUCTIONS.values(), ids=REDUCTIONS)


def make_tokens(batch=3, n=7, width=4, num_prefix_tokens=0, dtype=jnp.float32):
    """Makes tokens whose patch ids are not their indices, and scores whose rows sum to less than 1."""
    rng = np.random.default_rng(0)
    patch_ids = np.stack([rng.permutation(3 * n)[:n] for _ in range(batch)]).astype(np.int32)
    scores = rng.dirichlet(np.ones(n + 1), batch)[:, :n].astype(np.float32)
    x = jnp.asarray(rng.normal(size=(batch, num_prefix_tokens + n, width)), dtype)
    return Tokens(x, jnp.asarray(patch_ids)), jnp.asarray(scores)


make_many_tokens = functools.partial(make_tokens, n=49, width=16, num_prefix_tokens=2)


def keep_in_a_loop(tokens, scores, keep):
    """Returns kept tokens, their patch ids, and the weighted sum of the others, token by token."""
    x, patch_ids, scores = (np.asarray(array) for array in (tokens.x, tokens.patch_ids, scores))
    kept, ids, fused = [], [], []
    for image in range(len(scores)):
        order = sorted(range(scores.shape[1]), key=lambda token: -scores[image, token])
        kept.append([x[image, token] for token in order[:keep]])
        ids.append([patch_ids[image, token] for token in order[:keep]])
        total = np.zeros(x.shape[2])
        for token in order[keep:]:
            total += scores[image, token] * x[image, token]
        fused.append(total)
    return np.array(kept), np.array(ids), np.array(fused)


@pytest.mark.parametrize('count', [1, 3, 6, 7])
def test_keep_top_keeps_the_tokens_of_a_loop_best_first(count):
    tokens, scores = make_tokens()
    x, patch_ids, _ = keep_in_a_loop(tokens, scores, count)
    kept = keep_top(tokens, scores, count)
    np.testing.assert_array_equal(kept.x, x)
    np.testing.assert_array_equal(kept.patch_ids, patch_ids)
    assert kept.patch_ids.dtype == jnp.int32


@pytest.mark.parametrize('count', [1, 3, 6])
@pytest.mark.parametrize('stage', [0, 2])
def test_keep_top_with_fuse_weights_appends_the_weighted_sum_of_a_loop(count, stage):
    tokens, scores = make_tokens()
    x, patch_ids, fused = keep_in_a_loop(tokens, scores, count)
    kept = keep_and_fuse(tokens, scores, count, stage=stage)
    assert kept.x.shape[1] == kept.patch_ids.shape[1] == count + 1
    np.testing.assert_array_equal(kept.x[:, :count], x)
    np.testing.assert_array_equal(kept.patch_ids[:, :count], patch_ids)
    np.testing.assert_allclose(kept.x[:, count], fused, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(kept.patch_ids[:, count], -1 - stage)


def test_keep_top_with_fuse_weights_does_not_renormalise_them():
    scores = jnp.asarray([[0.5, 0.1, 0.05]])
    tokens = Tokens(jnp.ones((1, 3, 2)), jnp.arange(3)[None])
    np.testing.assert_allclose(keep_and_fuse(tokens, scores, 1).x[0, 1], 0.15, rtol=1e-6)
    np.testing.assert_allclose(keep_and_fuse(tokens, 2 * scores, 1).x[0, 1], 0.3, rtol=1e-6)


def test_keep_top_with_fuse_weights_gives_the_fused_token_the_size_and_scores_of_the_dropped_tokens():
    tokens, scores = make_tokens()
    size = jnp.asarray(np.random.default_rng(1).integers(1, 5, (3, 7)), jnp.float32)
    mask = jnp.asarray(np.random.default_rng(2).integers(0, 2, (3, 7)), jnp.float32)
    kept = keep_and_fuse(tokens.replace(size=size, mask=mask), scores, 3)
    rank = np.argsort(-np.asarray(scores), axis=1)
    for name, before, after in (('size', size, kept.size), ('scores', scores, kept.scores)):
        ranked = np.take_along_axis(np.asarray(before), rank, axis=1)
        np.testing.assert_array_equal(after[:, :3], ranked[:, :3], err_msg=name)
        np.testing.assert_allclose(after[:, 3], ranked[:, 3:].sum(1), rtol=1e-5, err_msg=name)
    np.testing.assert_array_equal(kept.mask[:, :3], np.take_along_axis(np.asarray(mask), rank, axis=1)[:, :3])
    np.testing.assert_array_equal(kept.mask[:, 3], 1)
    assert kept.size.dtype == kept.mask.dtype == jnp.float32


@each_reduction
def test_keep_top_updates_the_token_of_each_patch(reduce):
    tokens, scores = make_tokens()
    before = np.asarray([[0, 1, 2, 3, 4, 5, 6, -1, 2]] * 3)
    kept = reduce(tokens.replace(token_of_patch=jnp.asarray(before)), scores, 3)
    rank = np.argsort(np.argsort(-np.asarray(scores), axis=1), axis=1)
    dropped = 3 if reduce is keep_and_fuse else -1
    new_index = np.where(rank < 3, rank, dropped)
    expected = np.where(before < 0, -1, np.take_along_axis(new_index, np.maximum(before, 0), axis=1))
    np.testing.assert_array_equal(kept.token_of_patch, expected)


@each_reduction
def test_keep_top_with_permuted_tokens_returns_the_same_tokens(reduce):
    tokens, scores = make_tokens()
    order = np.random.default_rng(1).permutation(scores.shape[1])
    permuted = jax.tree.map(lambda array: array[:, order], tokens)
    expected, kept = reduce(tokens, scores, keep=3), reduce(permuted, scores[:, order], keep=3)
    np.testing.assert_allclose(kept.x, expected.x, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(kept.patch_ids, expected.patch_ids)


@each_reduction
def test_keep_top_of_a_batch_equals_keep_top_of_each_image(reduce):
    tokens, scores = make_tokens()
    whole = reduce(tokens, scores, keep=3)
    for image in range(len(scores)):
        alone = reduce(jax.tree.map(lambda array, i=image: array[i:i + 1], tokens), scores[image:image + 1], keep=3)
        np.testing.assert_allclose(alone.x[0], whole.x[image], rtol=1e-6)
        np.testing.assert_array_equal(alone.patch_ids[0], whole.patch_ids[image])


@each_reduction
def test_keep_top_in_bfloat16_keeps_the_dtype(reduce):
    tokens, scores = make_tokens(dtype=jnp.bfloat16)
    assert reduce(tokens, scores, keep=3).x.dtype == jnp.bfloat16


@each_reduction
@pytest.mark.parametrize('count', [-1, 0, 8])
def test_keep_top_with_a_count_out_of_range_raises(reduce, count):
    with pytest.raises(ValueError, match=rf'keep={count} is outside \[1, 7\]'):
        reduce(*make_tokens(), keep=count)


def test_keep_top_gives_scores_a_gradient_through_the_fused_token_only():
    tokens, scores = make_tokens()
    count, cotangent = 3, jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 4)), jnp.float32)

    def product(scores, index):
        return (keep_and_fuse(tokens, scores, count).x * cotangent)[:, index].sum()

    np.testing.assert_array_equal(jax.grad(product)(scores, slice(0, count)), 0)
    np.testing.assert_array_equal(jax.grad(lambda scores: keep_top(tokens, scores, count).x.sum())(scores), 0)
    dropped = np.argsort(np.argsort(-np.asarray(scores), axis=1), axis=1) >= count
    expected = np.einsum('bnd,bd->bn', tokens.x, cotangent[:, count]) * dropped
    assert np.count_nonzero(expected) == 3 * 4
    np.testing.assert_allclose(jax.grad(product)(scores, slice(count, None)), expected, rtol=1e-5, atol=1e-6)


@each_gather
@each_reduction
def test_gather_impl_gives_the_tokens_and_gradients_of_gather(reduce, gather_impl):
    tokens, scores = make_many_tokens()
    shape = reduce(tokens, scores, keep=20).x.shape
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)

    def product(x, scores, gather_impl):
        kept = reduce(tokens.replace(x=x), scores, keep=20, gather_impl=gather_impl)
        return (kept.x * cotangent).sum(), kept.replace(gather_impl='')

    value_and_grad = jax.value_and_grad(product, (0, 1), has_aux=True)
    expected, result = (value_and_grad(tokens.x, scores, name) for name in ('gather', gather_impl))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), result, expected)
    x_gradient, scores_gradient = result[1]
    assert np.any(x_gradient[:, :2]) and np.any(scores_gradient) == (reduce is keep_and_fuse)


@each_gather
@each_reduction
def test_gather_impl_in_bfloat16_does_not_change_kept_tokens(reduce, gather_impl):
    tokens, scores = make_many_tokens(dtype=jnp.bfloat16)
    expected, kept = (reduce(tokens, scores, keep=20, gather_impl=name) for name in ('gather', gather_impl))
    assert kept.x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kept.x[:, :22], expected.x[:, :22])
    fused = [np.asarray(result.x[:, 22:], np.float32) for result in (kept, expected)]
    np.testing.assert_allclose(*fused, rtol=0, atol=0.02)  # weights of about 1/50, rounded to 8 bits


@each_gather
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16], ids=['float32', 'bfloat16'])
def test_gather_impl_in_a_model_keeps_the_same_patches(gather_impl, dtype):
    config = layouts.SHAPE
    images = jnp.asarray(np.random.default_rng(2).normal(size=(4, 16, 16, 3)), jnp.float32)
    plan = make_plan(16, config.depth, rate=0.7, reduce_at=(0, 1))
    params = random_params(create(config))
    (logits, intermediates), (expected_logits, expected) = (
        jax.jit(functools.partial(create(config, dtype=dtype, gather_impl=name).apply, plan=plan))(params, images)
        for name in (gather_impl, 'gather'))
    jax.tree.map(np.testing.assert_array_equal, intermediates['kept'], expected['kept'])
    np.testing.assert_allclose(logits, expected_logits, rtol=0, atol=1e-5 if dtype == jnp.float32 else 0.05)


def operations(reduce, tokens, scores, platform, name):
    """Returns the lines of the lowered program that contain the name."""
    lowered = reduce.trace(tokens, scores).lower(lowering_platforms=(platform,)).as_text()
    return [line for line in lowered.splitlines() if name in line]


@pytest.mark.parametrize(('count', 'minor_to_major'), [(20, '2, 0, 1'), (125, '2, 1, 0')])
def test_keep_top_on_tpu_lays_out_tokens_outermost_unless_they_fill_the_lanes(count, minor_to_major):
    tokens, scores = make_many_tokens(n=140)
    reduce = jax.jit(functools.partial(keep_and_fuse, keep=count))
    constraint, = operations(reduce, tokens, scores, 'tpu', '@LayoutConstraint')
    assert f'result_layouts = [dense<[{minor_to_major}]>' in constraint
    assert not operations(reduce, tokens, scores, 'cpu', '@LayoutConstraint')


@pytest.mark.parametrize('train', [False, True])
def test_keep_top_on_tpu_multiplies_and_on_other_platforms_gathers(train):
    tokens, scores = make_many_tokens()
    reduce = jax.jit(functools.partial(keep_and_fuse, keep=20, train=train))

    def products(platform):
        return operations(reduce, tokens, scores, platform, 'dot_general')

    matrix = f'tensor<3x{22 if train else 23}x51x'
    assert any(matrix in line for line in products('tpu'))
    assert not any(matrix in line for platform in ('cpu', 'cuda') for line in products(platform))


def test_gather_impl_that_is_unknown_raises_and_names_the_nearest():
    with pytest.raises(ValueError, match="gather_impl 'gahter': did you mean gather"):
        keep(*make_tokens(), keep=3, gather_impl='gahter')
