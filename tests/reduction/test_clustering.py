"""DPC-KNN and K-medoids against loops over the tokens of each image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.reducers import DPCKNN, KMEDOIDS
from tests.helpers.merged_tokens import assert_merges_groups, make_inputs, make_tokens


def reduce(reducer, tokens, keep, seed=1):
    return jax.jit(lambda tokens: reducer.reduce(tokens, make_inputs(tokens, seed=seed), keep))(tokens)


def groups_of(x, centres):
    """Returns the tokens nearest to each centre, the centre first."""
    groups = [[centre] for centre in centres]
    for token in set(range(len(x))) - set(centres):
        groups[np.argmin([np.linalg.norm(x[token] - x[centre]) for centre in centres])].append(token)
    return groups


def dpcknn_in_a_loop(x, keep):
    n, width = x.shape
    distance = np.asarray([[np.linalg.norm(a - b) for b in x] for a in x])
    density = [np.exp(-np.mean(np.square(np.sort(row)[:5])) / width) for row in distance]
    scores = []
    for i in range(n):
        to_denser = [distance[i, j] for j in range(n) if density[j] > density[i]]
        scores.append(density[i] * min(to_denser, default=distance.max()))
    return groups_of(x, np.argsort(scores)[::-1][:keep].tolist())


def kmedoids_in_a_loop(x, weight, keep):
    medoids = np.argsort(-weight)[:keep].tolist()
    for _ in range(3):
        medoids = [min(group, key=lambda i, group=group: sum(weight[j] * np.linalg.norm(x[i] - x[j]) for j in group))
                   for group in groups_of(x, medoids)]
    return groups_of(x, medoids)


def assert_dpcknn_equals_the_loop(tokens, output, keep):
    groups = [dpcknn_in_a_loop(x, keep) for x in np.asarray(tokens.patches, np.float64)]
    assert_merges_groups(tokens, output, groups)


def assert_kmedoids_equals_the_loop(tokens, output, keep, importance):
    pairs = zip(np.asarray(tokens.patches, np.float64), np.asarray(importance))
    groups = [kmedoids_in_a_loop(x, weight, keep) for x, weight in pairs]
    assert_merges_groups(tokens, output, groups, merge=lambda x, size: x[0])


@pytest.mark.parametrize('num_prefix_tokens', [0, 1])
@pytest.mark.parametrize('keeps', [(1,), (7, 3), (14, 9, 4)], ids=str)
def test_dpcknn_in_repeated_reductions_merges_the_clusters_of_a_loop(keeps, num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for keep in keeps:
        output = reduce(DPCKNN, tokens, keep)
        assert_dpcknn_equals_the_loop(tokens, output, keep)
        tokens = output


@pytest.mark.parametrize('num_prefix_tokens', [0, 1])
@pytest.mark.parametrize('keeps', [(1,), (7, 3), (14, 9, 4)], ids=str)
def test_kmedoids_in_repeated_reductions_keeps_the_medoids_of_a_loop(keeps, num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for seed, keep in enumerate(keeps):
        output = reduce(KMEDOIDS, tokens, keep, seed)
        assert_kmedoids_equals_the_loop(tokens, output, keep, make_inputs(tokens, seed=seed).importance)
        tokens = output


@pytest.mark.parametrize('reducer', [DPCKNN, KMEDOIDS], ids=str)
def test_clustering_of_equal_tokens_gives_no_empty_cluster(reducer):
    tokens = make_tokens(n=8)
    tokens = tokens.replace(x=jnp.ones_like(tokens.x))
    output = reduce(reducer, tokens, 5)
    assert (np.asarray(output.size) >= 1).all() and output.size.sum() == tokens.size.sum()
    np.testing.assert_array_equal(output.x, 1)


@pytest.mark.parametrize('reducer', [DPCKNN, KMEDOIDS], ids=str)
def test_clustering_of_tokens_with_a_large_common_part_gives_the_same_clusters(reducer):
    tokens = make_tokens(n=15)
    shifted = tokens.replace(x=tokens.x + 300 * jnp.arange(6))
    groups = [reduce(reducer, each, 6).token_of_patch for each in (tokens, shifted)]
    np.testing.assert_array_equal(*groups)


def test_dpcknn_with_distant_tokens_ranks_densities_below_the_smallest_float():
    tokens = make_tokens(n=15)
    scaled = tokens.replace(x=12 * tokens.x)  # most densities exp(-mean) are 0 in float32
    output = reduce(DPCKNN, scaled, 6)
    groups = [dpcknn_in_a_loop(x, 6) for x in np.asarray(scaled.patches, np.float64)]
    assert_merges_groups(scaled, output, groups)


@pytest.mark.parametrize('reducer', [DPCKNN, KMEDOIDS], ids=str)
def test_clustering_has_a_finite_gradient(reducer):
    tokens = make_tokens(n=15)

    def loss(x):
        changed = tokens.replace(x=x)
        return (reducer.reduce(changed, make_inputs(changed), 6).x ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(tokens.x)
    assert np.isfinite(gradient).all() and np.any(gradient)
