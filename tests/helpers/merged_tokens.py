"""Tokens to be merged, and the check that a reducer has merged given groups of them."""

import types

import jax.numpy as jnp
import numpy as np

from evit_jax.reduction.tokens import Tokens


def make_tokens(batch=3, n=9, width=6, num_prefix_tokens=1):
    """Makes patch tokens that hold one or two patches each, after the prefix tokens."""
    rng = np.random.default_rng(0)
    token_of_patch = np.stack([rng.permutation([*range(n), 0, 3, -1]) for _ in range(batch)]).astype(np.int32)
    patch_ids = np.stack([[row.tolist().index(token) for token in range(n)] for row in token_of_patch]).astype(np.int32)
    size = np.stack([np.bincount(row[row >= 0], minlength=n) for row in token_of_patch]).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(batch, num_prefix_tokens + n, width)), jnp.float32)
    return Tokens(x, jnp.asarray(patch_ids), jnp.asarray(token_of_patch), jnp.asarray(size))


def make_inputs(tokens, *, block=0, depth=12, seed=1):
    """Makes random keys and importance for tokens."""
    rng, shape = np.random.default_rng(seed), tokens.patch_ids.shape
    keys = jnp.asarray(rng.normal(size=(*shape, 5)), jnp.float32)
    importance = jnp.asarray(rng.dirichlet(np.ones(shape[1]), shape[0]), jnp.float32)
    return types.SimpleNamespace(mean_keys=keys, importance=importance, block=block, depth=depth)


def match_in_a_loop(keys, keep, num_prefix_tokens):
    """Returns the groups of tokens of one image that are merged, destination first, in the order of the output."""
    n, unit = len(keys), keys / np.linalg.norm(keys, axis=1, keepdims=True)
    a = [token for token in range(n) if (token + num_prefix_tokens) % 2 == 0]
    b = [token for token in range(n) if (token + num_prefix_tokens) % 2]
    best = {token: max(b, key=lambda other, token=token: unit[token] @ unit[other]) for token in a}
    merged = sorted(a, key=lambda token: -unit[token] @ unit[best[token]])[:n - keep]
    return [[token] for token in a if token not in merged] + [
        [token, *(source for source in merged if best[source] == token)] for token in b]


def mean_of_group(x, size):
    """Returns the mean of tokens [n, D], weighted by their sizes [n]."""
    return (size[:, None] * x).sum(0) / size.sum()


def assert_merges_groups(tokens, output, groups, merge=mean_of_group):
    """Asserts that the output of a reduction holds these groups of each image, after unchanged prefix tokens.

    Args:
      groups: for each image, lists of token indices in the order of the output. The first token of a group gives it its
        patch id.
      merge: activations [n, D] and sizes [n] of the tokens in a group -> activations of the group [D].
    """
    np.testing.assert_array_equal(output.x[:, :output.num_prefix_tokens], tokens.x[:, :tokens.num_prefix_tokens])
    x, merged = np.asarray(tokens.patches), output.patches
    for image, groups_of_image in enumerate(groups):
        assert len(groups_of_image) == output.patch_ids.shape[1]
        for index, group in enumerate(groups_of_image):
            size = np.asarray(tokens.size)[image, group]
            np.testing.assert_allclose(merged[image, index], merge(x[image, group], size), rtol=1e-5, atol=1e-6)
            assert output.size[image, index] == size.sum()
            assert output.patch_ids[image, index] == tokens.patch_ids[image, group[0]]
            in_group = np.isin(tokens.token_of_patch[image], group)
            np.testing.assert_array_equal(np.asarray(output.token_of_patch[image]) == index, in_group)
