"""DynamicViT drops tokens by the decisions of learned predictors, placed before the reducing blocks.

Source: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification", NeurIPS 2021,
arXiv 2106.02034; raoyongming/DynamicViT.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.activations import gelu
from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.reducer import Reducer, floor_rate
from evit_jax.reduction.registry import register_reducer
from evit_jax.reduction.tokens import remap


class ScorePredictor(nnx.Module):
    """Predicts whether to keep each token, from the token itself and the mean of all tokens (section 3.2).

    The layer names follow the reference's `PredictorLG`.
    """

    def __init__(self, width: int, *, init_std: float = 0.02, dtype, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(stddev=init_std)
        linear = functools.partial(nnx.Linear, kernel_init=init, rngs=rngs)
        self.in_conv = nnx.List([nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs),
                                 linear(width, width, dtype=dtype), gelu])
        self.out_conv = nnx.List([linear(width, width // 2, dtype=dtype), gelu,
                                  linear(width // 2, width // 4, dtype=dtype), gelu,
                                  linear(width // 4, 2, dtype=jnp.float32)])

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Returns the log-probabilities to keep and to drop each token, [B, N, 2] float32.

        Args:
          x: [B, N, D], patch tokens.
          mask: [B, N] float32; the mean excludes tokens with mask 0. None: it includes all tokens.
        """
        for layer in self.in_conv:
            x = layer(x)
        local, common = jnp.split(x, 2, axis=-1)
        mask = jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask
        count = jnp.maximum(mask.sum(1), 0.5)  # avoids 0 / 0: the mean is 0 if all tokens of an image are masked
        mean = jnp.einsum('bnd,bn->bd', common, mask, preferred_element_type=jnp.float32) / count[:, None]
        x = jnp.concatenate([local, jnp.broadcast_to(mean[:, None].astype(x.dtype), common.shape)], axis=-1)
        for layer in self.out_conv:
            x = layer(x)
        return jax.nn.log_softmax(x.astype(jnp.float32))


class DynamicViT(Reducer):
    """Keeps the tokens with the highest keep probability. Its training variant is `MaskedDynamicViT`."""

    can_fuse = False
    before_block = True
    checkpoint_prefix = 'score_predictor'  # prefix of the learned weights in the reference's checkpoints

    def reduce(self, tokens, inputs, keep):
        prediction = self._predict(tokens, inputs)
        return keep_top(tokens, prediction[..., 0], keep)

    def num_kept(self, patches, entering, rates):
        return floor_rate(patches, entering, rates)

    def make_module(self, width, *, keep, init_std, dtype, rngs):
        return ScorePredictor(width, init_std=init_std, dtype=dtype, rngs=rngs)

    def module_macs(self, tokens, width, keep):
        half, quarter = width // 2, width // 4
        return tokens * (width * width + width * half + half * quarter + quarter * 2)

    def in_training(self):
        return MASKED

    def _predict(self, tokens, inputs):
        prediction = inputs.module(tokens.patches, tokens.mask)
        inputs.record('prediction', prediction)
        return prediction


class MaskedDynamicViT(DynamicViT):
    """Masks tokens instead of dropping them, so that the decisions get a gradient. No token count changes.

    The predictor alone decides how many tokens are kept; a loss draws this number towards `keep`. A decision is a
    straight-through hard Gumbel-softmax with temperature 1. Evaluation adds no noise (section 3.3).
    """

    name = 'dynamicvit (masked)'

    def reduce(self, tokens, inputs, keep):
        logits = self._predict(tokens, inputs)
        if inputs.train:
            logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(inputs.rng)
        soft = jax.nn.softmax(logits)[..., 0]
        hard = (logits[..., 0] >= logits[..., 1]).astype(soft.dtype)
        decision = hard + (soft - jax.lax.stop_gradient(soft))
        mask = decision if tokens.mask is None else decision * tokens.mask
        new_index = jnp.where(mask > 0, jnp.arange(mask.shape[1], dtype=jnp.int32), -1)
        return tokens.replace(mask=mask, token_of_patch=remap(tokens.token_of_patch, new_index))

    def num_leaving(self, entering, keep, fuse):
        return entering


DYNAMICVIT = register_reducer('dynamicvit')(DynamicViT)
MASKED = MaskedDynamicViT()
