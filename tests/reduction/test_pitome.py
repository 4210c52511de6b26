"""PiToMe against a loop over the tokens of each image."""

import jax
import numpy as np
import pytest

from evit_jax.reduction.reducers import PITOME
from tests.helpers.merged_tokens import assert_merges_groups, make_inputs, make_tokens


def energies_in_a_loop(keys, block, depth):
    """Returns the energy of each token of an image; keys [N, d] have norm 1."""
    margin = 0.9 - 0.9 * block / depth
    cosine = keys @ keys.T - margin
    return [np.mean([c if c >= 0 else np.exp(c) - 1 for c in row]) for row in cosine]


def pitome_in_a_loop(keys, keep, block, depth):
    """Returns the groups of tokens of one image, the kept token first, in the order of the output."""
    keys, r = keys / np.linalg.norm(keys, axis=1, keepdims=True), len(keys) - keep
    order = np.argsort(energies_in_a_loop(keys, block, depth))[::-1].tolist()
    a, b, protected = order[0:2 * r:2], order[1:2 * r:2], order[2 * r:]
    groups = {token: [token] for token in protected + b}
    for token in a:
        groups[max(b, key=lambda other, token=token: keys[token] @ keys[other])].append(token)
    return list(groups.values())


@pytest.mark.parametrize('num_prefix_tokens', [0, 1, 2])
@pytest.mark.parametrize('keeps', [(14, 10, 5), (8, 7, 4)], ids=str)
def test_pitome_in_repeated_reductions_merges_the_groups_of_a_loop(keeps, num_prefix_tokens):
    tokens = make_tokens(n=15, num_prefix_tokens=num_prefix_tokens)
    for block, keep in enumerate(keeps):
        inputs = make_inputs(tokens, block=block, depth=3, seed=block)
        output = PITOME.reduce(tokens, inputs, keep)
        groups = [pitome_in_a_loop(keys, keep, block, 3) for keys in np.asarray(inputs.mean_keys, np.float64)]
        assert_merges_groups(tokens, output, groups)
        tokens = output


def test_pitome_merges_a_cluster_of_equal_tokens_and_protects_the_others():
    tokens = make_tokens(n=12)
    inputs = make_inputs(tokens, block=6)
    inputs.mean_keys = inputs.mean_keys.at[:, 2:8].set(inputs.mean_keys[:, 2:3])
    output = jax.jit(lambda tokens: PITOME.reduce(tokens, inputs, 9))(tokens)
    for image in range(3):
        of_token = dict(zip(np.asarray(tokens.token_of_patch[image]), np.asarray(output.token_of_patch[image])))
        shared = [token for token in range(12) if list(of_token.values()).count(of_token[token]) > 1]
        assert len({of_token[token] for token in range(12)}) == 9 and set(shared) <= set(range(2, 8))


def test_pitome_that_keeps_all_tokens_returns_them():
    tokens = make_tokens()
    assert PITOME.reduce(tokens, make_inputs(tokens), 9) is tokens


@pytest.mark.parametrize('entering, least', [(15, 8), (16, 8), (1, 1)])
def test_pitome_keeps_at_least_half_of_the_tokens(entering, least):
    assert PITOME.min_kept(entering) == least
