"""Ward and prune-merge against a loop over the tokens of each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.reducers import PRUNE_MERGE, WARD
from tests.helpers.merged_tokens import assert_merges_groups, make_inputs, make_tokens


def groups_in_a_loop(x, size, importance, keep, drop=0):
    """Returns the groups of tokens of one image, the kept token first, in the order of the kept tokens."""
    tokens = sorted(range(len(x)), key=lambda token: importance[token])[drop:]  # from the least important one
    joins = []
    for rank, token in enumerate(tokens[:-1]):
        costs = {other: np.square(x[token] - x[other]).sum() * size[token] * size[other] / (size[token] + size[other])
                 for other in tokens[rank + 1:]}
        leader = min(costs, key=costs.get)
        joins.append((costs[leader], token, leader))
    leaders = {token: leader for _, token, leader in sorted(joins)[:len(tokens) - keep]}
    groups = {token: [token] for token in sorted(tokens) if token not in leaders}
    for token, leader in leaders.items():
        while leader in leaders:
            leader = leaders[leader]
        groups[leader].append(token)
    return list(groups.values())


def mean_with_mean_norm(x, size):
    """Returns the mean of tokens, scaled to the mean of their norms."""
    mean = (size[:, None] * x).sum(0) / size.sum()
    return mean * (size * np.linalg.norm(x, axis=1)).sum() / size.sum() / np.linalg.norm(mean)


def expected_groups(tokens, inputs, keep, drop=0):
    x, size, importance = (np.asarray(array, np.float64) for array in (tokens.patches, tokens.size, inputs.importance))
    return [groups_in_a_loop(*of_image, keep, drop) for of_image in zip(x, size, importance)]


@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 3])
@pytest.mark.parametrize('keeps', [(14, 10, 5, 1), (3,)], ids=str)
def test_ward_in_repeated_reductions_merges_the_groups_of_a_loop(keeps, num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for seed, keep in enumerate(keeps):
        inputs = make_inputs(tokens, seed=seed)
        output = jax.jit(lambda tokens, inputs=inputs, keep=keep: WARD.reduce(tokens, inputs, keep))(tokens)
        assert_merges_groups(tokens, output, expected_groups(tokens, inputs, keep), mean_with_mean_norm)
        tokens = output


@pytest.mark.parametrize('keep, drop', [(12, 2), (12, 3), (6, 5), (1, 13)])
def test_prune_merge_drops_the_least_important_tokens_and_merges_others(keep, drop):
    tokens = make_tokens(n=15)
    inputs = make_inputs(tokens)
    inputs.drop = drop
    output = PRUNE_MERGE.reduce(tokens, inputs, keep)
    assert_merges_groups(tokens, output, expected_groups(tokens, inputs, keep, drop), mean_with_mean_norm)


def test_prune_merge_without_drops_equals_ward():
    tokens = make_tokens()
    inputs = make_inputs(tokens)
    inputs.drop = 0
    for one, other in zip(jax.tree.leaves(PRUNE_MERGE.reduce(tokens, inputs, 5)),
                          jax.tree.leaves(WARD.reduce(tokens, inputs, 5))):
        np.testing.assert_array_equal(one, other)


def test_ward_of_equal_tokens_with_equal_importance_keeps_shapes_and_values():
    tokens = make_tokens()
    x = jnp.broadcast_to(tokens.x[:, :1], tokens.x.shape)
    inputs = make_inputs(tokens)
    inputs.importance = jnp.full_like(inputs.importance, 1 / 9)
    output = WARD.reduce(tokens.replace(x=x), inputs, 4)
    np.testing.assert_allclose(output.x, x[:, :5], rtol=1e-6)
    np.testing.assert_array_equal(output.size.sum(1), tokens.size.sum(1))


def test_ward_of_zero_activations_has_a_finite_gradient():
    tokens, inputs = make_tokens(), make_inputs(make_tokens())
    gradient = jax.grad(lambda x: jnp.square(WARD.reduce(tokens.replace(x=x), inputs, 5).x).sum())(0 * tokens.x)
    assert np.isfinite(gradient).all()


def test_ward_that_keeps_all_tokens_returns_them():
    tokens = make_tokens()
    assert WARD.reduce(tokens, make_inputs(tokens), 9) is tokens
