"""Sinkhorn clustering assigns the tokens softly to K learned centres, in equal parts.

Source: Haurum et al., "Multi-scale hybrid vision transformer and Sinkhorn tokenizer for sewer defect classification",
Automation in Construction 144, 2022; JoakimHaurum/TokenReduction, sinkhorn.py. Cuturi, "Sinkhorn Distances", NeurIPS
2013, arXiv 1306.0895. Parity: tests/reduction/test_soft_assignment_golden.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.reduction.reducers.soft_assignment import SoftAssignment
from evit_jax.reduction.registry import register_reducer

EPSILON = 1.0   # weight of the entropy; the source's default
ITERATIONS = 3  # normalisations of centres and tokens; the source's default


class Centres(nnx.Module):
    """Computes an entropic optimal transport of the tokens to K learned centres [K, D]."""

    def __init__(self, width: int, keep: int, *, rngs: nnx.Rngs):
        self.centres = nnx.Param(jax.random.normal(rngs.params(), (keep, width)))

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """Returns the plan of the transport [B, K, N] and the unit tokens [B, N, D], float32."""
        x, centres = _unit(x.astype(jnp.float32)), _unit(self.centres[...])
        logits = jnp.einsum('kd,bnd->bkn', centres, x, precision='highest') / EPSILON
        for _ in range(ITERATIONS):
            logits = logits - jax.nn.logsumexp(logits, axis=2, keepdims=True)  # equal parts for all centres
            logits = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)  # the weights of a token sum to 1
        return jnp.exp(logits), x


@register_reducer('sinkhorn')
class SINKHORN(SoftAssignment):
    """Replaces the tokens by K sums, before the block: y_k = sum_i w_ki x_i / |x_i|.

    The weights w maximise sum_ki w_ki cos(c_k, x_i) + entropy(w) with equal parts: each token has the weight 1, each
    centre N / K. Sinkhorn's three iterations meet the first exactly and the second nearly. The number of centres is
    fixed in training, so that each plan needs its own training. Departure: the source normalises its centres in place,
    outside the gradient; here the gradient passes through the norm.
    """

    def make_module(self, width, *, keep, init_std, dtype, rngs):
        return Centres(width, keep, rngs=rngs)


def _unit(x):
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
