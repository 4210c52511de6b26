import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.apply import fused_weights
from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.tokens import Tokens


def keep_top_and_fuse(tokens, score, keep, stage=0):
    return keep_top(tokens.replace(stage=stage), score, keep, fuse_weights=score)


REDUCERS = [keep_top, functools.partial(keep_top_and_fuse, stage=1)]
each_reducer = pytest.mark.parametrize('reduce', REDUCERS, ids=['keep_top', 'keep_top_and_fuse'])


def make_tokens(batch=3, n=7, width=4):
    """Tokens whose patch ids are not their places and a score whose rows sum to less than 1."""
    rng = np.random.default_rng(0)
    patch = np.stack([rng.permutation(20)[:n] for _ in range(batch)]).astype(np.int32)
    score = rng.dirichlet(np.ones(n + 1), batch)[:, :n].astype(np.float32)
    return Tokens(jnp.asarray(rng.normal(size=(batch, n, width)), jnp.float32), jnp.asarray(patch)), jnp.asarray(score)


def reduced_in_a_loop(tokens, score, keep):
    """Kept tokens, their patches and the weighted sum of the others, one image and one token at a time."""
    x, patch, score = (np.asarray(a) for a in (tokens.x, tokens.patch_ids, score))
    kept, ids, fused = [], [], []
    for image in range(len(score)):
        order = sorted(range(score.shape[1]), key=lambda token: -score[image, token])
        kept.append([x[image, token] for token in order[:keep]])
        ids.append([patch[image, token] for token in order[:keep]])
        blend = np.zeros(x.shape[2])
        for token in order[keep:]:
            blend += score[image, token] * x[image, token]
        fused.append(blend)
    return np.array(kept), np.array(ids), np.array(fused)


@pytest.mark.parametrize('keep', [1, 3, 6, 7])
def test_keep_top_keeps_what_a_loop_keeps_best_first(keep):
    tokens, score = make_tokens()
    x, patch, _ = reduced_in_a_loop(tokens, score, keep)
    got = keep_top(tokens, score, keep)
    np.testing.assert_array_equal(got.x, x)
    np.testing.assert_array_equal(got.patch_ids, patch)
    assert got.patch_ids.dtype == jnp.int32


@pytest.mark.parametrize('keep', [1, 3, 6])
@pytest.mark.parametrize('stage', [0, 2])
def test_fused_token_comes_last_and_is_the_sum_of_a_loop(keep, stage):
    tokens, score = make_tokens()
    x, patch, fused = reduced_in_a_loop(tokens, score, keep)
    got = keep_top_and_fuse(tokens, score, keep, stage)
    assert got.x.shape[1] == got.patch_ids.shape[1] == keep + 1
    np.testing.assert_array_equal(got.x[:, :keep], x)
    np.testing.assert_array_equal(got.patch_ids[:, :keep], patch)
    np.testing.assert_allclose(got.x[:, keep], fused, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got.patch_ids[:, keep], -1 - stage)


def test_weights_of_the_fused_token_are_not_renormalised():
    score = jnp.asarray([[0.5, 0.1, 0.05]])
    tokens = Tokens(jnp.ones((1, 3, 2)), jnp.arange(3)[None])
    np.testing.assert_allclose(keep_top_and_fuse(tokens, score, 1, 0).x[0, 1], 0.15, rtol=1e-6)
    np.testing.assert_allclose(keep_top_and_fuse(tokens, 2 * score, 1, 0).x[0, 1], 0.3, rtol=1e-6)


@each_reducer
def test_order_of_the_patches_does_not_matter(reduce):
    tokens, score = make_tokens()
    order = np.random.default_rng(1).permutation(score.shape[1])
    shuffled = jax.tree.map(lambda a: a[:, order], tokens)
    want, got = reduce(tokens, score, keep=3), reduce(shuffled, score[:, order], keep=3)
    np.testing.assert_allclose(got.x, want.x, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got.patch_ids, want.patch_ids)


@each_reducer
def test_images_do_not_mix(reduce):
    tokens, score = make_tokens()
    whole = reduce(tokens, score, keep=3)
    for image in range(len(score)):
        alone = reduce(jax.tree.map(lambda a, i=image: a[i:i + 1], tokens), score[image:image + 1], keep=3)
        np.testing.assert_allclose(alone.x[0], whole.x[image], rtol=1e-6)
        np.testing.assert_array_equal(alone.patch_ids[0], whole.patch_ids[image])


@each_reducer
def test_tokens_keep_their_dtype(reduce):
    tokens, score = make_tokens()
    assert reduce(tokens.replace(x=tokens.x.astype(jnp.bfloat16)), score, keep=3).x.dtype == jnp.bfloat16


@each_reducer
@pytest.mark.parametrize('keep', [-1, 0, 8])
def test_keep_outside_its_range_is_an_error(reduce, keep):
    with pytest.raises(ValueError, match=rf'keep={keep} is outside \[1, 7\]'):
        reduce(*make_tokens(), keep=keep)


def test_scores_get_a_gradient_through_the_fused_token_only():
    tokens, score = make_tokens()
    keep, toward = 3, jnp.asarray(np.random.default_rng(2).normal(size=(3, 4, 4)), jnp.float32)

    def read(score, places):
        return (keep_top_and_fuse(tokens, score, keep, 0).x * toward)[:, places].sum()

    np.testing.assert_array_equal(jax.grad(read)(score, slice(0, keep)), 0)
    np.testing.assert_array_equal(jax.grad(lambda s: keep_top(tokens, s, keep).x.sum())(score), 0)
    dropped = np.argsort(np.argsort(-np.asarray(score), axis=1), axis=1) >= keep
    want = np.einsum('bnd,bd->bn', tokens.x, toward[:, keep]) * dropped
    assert np.count_nonzero(want) == 3 * 4
    np.testing.assert_allclose(jax.grad(read)(score, slice(keep, None)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('keeps', [(4, 1), (4, 4), (2, 1, 1), (3, 2, 1)])
def test_a_fused_token_is_the_sum_of_the_patches_by_their_origin(keeps):
    rng, patches = np.random.default_rng(3), 7
    x = jnp.asarray(rng.normal(size=(3, patches, 4)), jnp.float32)
    tokens, origins = Tokens(x, jnp.broadcast_to(jnp.arange(patches), (3, patches))), ()
    for stage, keep in enumerate(keeps):
        score = jnp.asarray(rng.dirichlet(np.ones(tokens.patch_ids.shape[1] + 1), 3)[:, 1:], jnp.float32)
        left = keep_top_and_fuse(tokens, score, keep, stage)
        origins += (fused_weights(tokens.patch_ids, score, left.patch_ids, origins, patches),)
        tokens = left
        np.testing.assert_allclose(jnp.einsum('bn,bnd->bd', origins[-1], x), tokens.x[:, -1], rtol=1e-5, atol=1e-6)
        still_there = np.where(tokens.patch_ids < 0, patches, tokens.patch_ids)
        assert not np.take_along_axis(np.pad(origins[-1], ((0, 0), (0, 1))), still_there, axis=1).any()


def test_origins_are_those_of_a_loop_over_dropped_tokens():
    patch, score = jnp.asarray([[2, -1, 0, 4]]), jnp.asarray([[0.4, 0.2, 0.1, 0.05]])
    before = (jnp.asarray([[0, 0.3, 0, 0.5, 0]]),)  # of the token fused first: patches 1 and 3
    got = fused_weights(patch, score, jnp.asarray([[2, -2]]), before, 5)
    np.testing.assert_allclose(got, [[0.1, 0.2 * 0.3, 0, 0.2 * 0.5, 0.05]], rtol=1e-6)
    kept_on = fused_weights(patch, score, jnp.asarray([[2, -1, -2]]), before, 5)
    np.testing.assert_allclose(kept_on, [[0.1, 0, 0, 0, 0.05]], rtol=1e-6)
