"""PatchMerger merges the tokens into K weighted means by attention to K learned queries.

Source: Renggli et al., "Learning to Merge Tokens in Vision Transformers", arXiv 2202.12015; reimplemented in
JoakimHaurum/TokenReduction, patchmerger.py. Parity: tests/reduction/test_soft_assignment_golden.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.reduction.reducers.soft_assignment import SoftAssignment
from evit_jax.reduction.registry import register_reducer


class QueryAttention(nnx.Module):
    """Computes the attention of K learned queries [K, D] to the normalised tokens."""

    def __init__(self, width: int, keep: int, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.queries = nnx.Param(jax.random.normal(rngs.params(), (keep, width)))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Returns the weights [B, K, N] and the normalised tokens [B, N, D], float32."""
        x = self.norm(x)
        logits = jnp.einsum('kd,bnd->bkn', self.queries[...], x, precision='highest')
        return jax.nn.softmax(logits), x


@register_reducer('patchmerger')
class PATCHMERGER(SoftAssignment):
    """Replaces the tokens by K means, before the block: Y = softmax(Q LN(X)^T) LN(X), with learned queries Q.

    The logits are not divided by sqrt(D), as in both sources. The number of queries is fixed in training, so that each
    plan needs its own training.
    """

    def make_module(self, width, *, keep, init_std, dtype, rngs):
        return QueryAttention(width, keep, rngs=rngs)
