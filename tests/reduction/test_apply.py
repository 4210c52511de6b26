"""The weights of the patches in fused tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.reduction.apply import fused_weights
from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.tokens import Tokens


@pytest.mark.parametrize('keeps', [(4, 1), (4, 4), (2, 1, 1), (3, 2, 1)])
def test_fused_weights_after_several_reductions_sum_the_patches_to_the_fused_token(keeps):
    rng, patches = np.random.default_rng(3), 7
    reduce = jax.jit(lambda tokens, scores, keep: keep_top(tokens, scores, keep, fuse_weights=scores), static_argnums=2)
    weights_of = jax.jit(fused_weights, static_argnums=4)
    x = jnp.asarray(rng.normal(size=(3, patches, 4)), jnp.float32)
    tokens, weights = Tokens(x, jnp.broadcast_to(jnp.arange(patches), (3, patches))), ()
    for stage, keep in enumerate(keeps):
        scores = jnp.asarray(rng.dirichlet(np.ones(tokens.patch_ids.shape[1] + 1), 3)[:, 1:], jnp.float32)
        reduced = reduce(tokens.replace(stage=stage), scores, keep)
        weights += (weights_of(tokens.patch_ids, scores, reduced.patch_ids, weights, patches),)
        tokens = reduced
        np.testing.assert_allclose(jnp.einsum('bn,bnd->bd', weights[-1], x), tokens.x[:, -1], rtol=1e-5, atol=1e-6)
        kept = np.where(tokens.patch_ids < 0, patches, tokens.patch_ids)
        assert not np.take_along_axis(np.pad(weights[-1], ((0, 0), (0, 1))), kept, axis=1).any()


def test_fused_weights_of_a_dropped_fused_token_are_the_products_of_both_weights():
    patch_ids, scores = jnp.asarray([[2, -1, 0, 4]]), jnp.asarray([[0.4, 0.2, 0.1, 0.05]])
    before = (jnp.asarray([[0, 0.3, 0, 0.5, 0]]),)  # the first fused token holds patches 1 and 3
    dropped = fused_weights(patch_ids, scores, jnp.asarray([[2, -2]]), before, 5)
    np.testing.assert_allclose(dropped, [[0.1, 0.2 * 0.3, 0, 0.2 * 0.5, 0.05]], rtol=1e-6)
    kept = fused_weights(patch_ids, scores, jnp.asarray([[2, -1, -2]]), before, 5)
    np.testing.assert_allclose(kept, [[0.1, 0, 0, 0, 0.05]], rtol=1e-6)
