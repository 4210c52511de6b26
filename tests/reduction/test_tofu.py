"""ToFu against a loop over the tokens of each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.reducers import TOFU
from tests.helpers.merged_tokens import assert_merges_groups, make_inputs, make_tokens, match_in_a_loop, mean_of_group

DEPTH = 12


def mlerp(x, size):
    """Returns the mean of tokens [n, D], scaled to the largest of their norms."""
    mean = mean_of_group(x, size)
    return mean / np.linalg.norm(mean) * np.linalg.norm(x, axis=1).max()


def loop_groups(inputs, keep, num_prefix_tokens):
    return [match_in_a_loop(keys, keep, num_prefix_tokens) for keys in np.asarray(inputs.mean_keys)]


@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 2])
def test_tofu_in_late_blocks_merges_the_groups_of_a_loop_by_mlerp(num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for block, keep in zip((7, 9, 11), (14, 10, 5)):
        inputs = make_inputs(tokens, block=block, depth=DEPTH, seed=block)
        output = TOFU.reduce(tokens, inputs, keep)
        assert_merges_groups(tokens, output, loop_groups(inputs, keep, num_prefix_tokens), merge=mlerp)
        tokens = output


@pytest.mark.parametrize('num_prefix_tokens', [0, 1])
def test_tofu_in_early_blocks_drops_the_merged_tokens_of_a_loop(num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for block, keep in zip((0, 6), (10, 5)):
        inputs = make_inputs(tokens, block=block, depth=DEPTH, seed=block)
        output = TOFU.reduce(tokens, inputs, keep)
        groups = [[group[:1] for group in groups] for groups in loop_groups(inputs, keep, num_prefix_tokens)]
        assert_merges_groups(tokens, output, groups)
        tokens = output


@pytest.mark.parametrize('block', [0, 11])
def test_tofu_has_a_finite_gradient_at_zero_tokens(block):
    tokens = make_tokens()

    def loss(x):
        changed = tokens.replace(x=x)
        return (TOFU.reduce(changed, make_inputs(changed, block=block, depth=DEPTH), 6).x ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    assert np.isfinite(gradient(jnp.zeros_like(tokens.x))).all()
    assert np.isfinite(gradient(tokens.x)).all() and np.any(gradient(tokens.x))
