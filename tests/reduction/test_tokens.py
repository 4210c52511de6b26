"""The Tokens dataclass and the index of the token that holds each patch."""

import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.tokens import Tokens, remap


def make_tokens(num_prefix_tokens=2, n=4, **fields):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, num_prefix_tokens + n, 5)), jnp.float32)
    return Tokens(x, jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (3, n)), **fields)


@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 2])
def test_tokens_with_prefix_tokens_splits_them_from_the_patches(num_prefix_tokens):
    tokens = make_tokens(num_prefix_tokens)
    assert tokens.num_prefix_tokens == num_prefix_tokens
    np.testing.assert_array_equal(tokens.prefix, tokens.x[:, :num_prefix_tokens])
    np.testing.assert_array_equal(tokens.patches, tokens.x[:, num_prefix_tokens:])


@pytest.mark.parametrize('num_queries', [6, 1])
def test_add_with_a_branch_of_the_first_tokens_drops_the_others(num_queries):
    tokens = make_tokens(size=jnp.ones((3, 4)))
    branch = jnp.full((3, num_queries, 5), 2.0)
    added = tokens.add(branch)
    np.testing.assert_array_equal(added.x, np.asarray(tokens.x)[:, :num_queries] + 2)
    assert added.patch_ids is tokens.patch_ids and added.size is tokens.size


def test_first_with_a_count_drops_the_other_activations():
    tokens = make_tokens()
    first = tokens.first(2)
    np.testing.assert_array_equal(first.x, tokens.x[:, :2])
    assert first.patch_ids is tokens.patch_ids
    assert tokens.first(None) is tokens


def test_remap_after_a_reduction_follows_kept_and_dropped_tokens():
    token_of_patch = jnp.asarray([[0, 1, 2, -1, 1]])
    new_index = jnp.asarray([[1, 0, -1]])
    np.testing.assert_array_equal(remap(token_of_patch, new_index), [[1, 0, -1, -1, 0]])


def test_remap_without_token_of_patch_returns_none():
    assert remap(None, jnp.asarray([[1, 0, -1]])) is None
