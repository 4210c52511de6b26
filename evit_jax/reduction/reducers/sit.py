"""SiT (self-slimmed ViT) aggregates the tokens into K weighted means. A small MLP predicts the weights.

Source: Zong et al., "Self-slimmed Vision Transformer", ECCV 2022, arXiv 2111.12624; Sense-X/SiT.
Parity: tests/reduction/test_soft_assignment_golden.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.activations import gelu
from evit_jax.reduction.merging import merge_soft
from evit_jax.reduction.reducers.soft_assignment import SoftAssignment
from evit_jax.reduction.registry import register_reducer


class TokenSlimming(nnx.Module):
    """Predicts the weights of the tokens in K means: LayerNorm, Linear(D, D / 2), GELU, Linear(D / 2, K)."""

    def __init__(self, width: int, keep: int, *, init_std: float, dtype, rngs: nnx.Rngs):
        init, half = nnx.initializers.truncated_normal(stddev=init_std), width // 2
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, half, kernel_init=init, dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(half, keep, kernel_init=init, dtype=dtype, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x: Array) -> Array:
        """Returns the weights [B, K, N] float32 of the tokens [B, N, D]. The weights of a mean sum to 1."""
        logits = self.fc2(gelu(self.fc1(self.norm(x)))).astype(jnp.float32)
        return jax.nn.softmax(logits * self.scale[...], axis=1).swapaxes(1, 2)


@register_reducer('sit')
class SIT(SoftAssignment):
    """Replaces the tokens by K means, before the block: x_k = sum_i w_ki x_i, w_k = softmax over i of MLP(x_i)_k.

    The learned modules need `keep` outputs, so that each plan needs its own training. The source also distils from the
    dense model (feature recycling); use config.distill.kind=self.
    """

    def reduce(self, tokens, inputs, keep):
        return merge_soft(tokens, inputs.module(tokens.patches), tokens.patches)

    def make_module(self, width, *, keep, init_std, dtype, rngs):
        return TokenSlimming(width, keep, init_std=init_std, dtype=dtype, rngs=rngs)

    def module_macs(self, tokens, width, keep):
        return tokens * (width // 2 * (width + keep) + keep * width)
