"""DynamicViT's predictor of the tokens that may go, which stands in front of a block.

Source: DynamicViT, arXiv 2106.02034, section 3.2; raoyongming/DynamicViT, `PredictorLG`.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.models import layers

WEIGHTS = 'score_predictor.'  # how the names of their weights begin


def predictors_in(names: Iterable[str]) -> int:
    """Predictors that weights are of, by their dotted names."""
    return len({name.removeprefix(WEIGHTS).split('.')[0] for name in names if name.startswith(WEIGHTS)})


class Predictor(nnx.Module):
    """Looks at each token and at the mean of all that are there; the names are those of the reference's weights."""

    def __init__(self, width: int, *, std: float = 0.02, dtype, rngs: nnx.Rngs):
        linear = functools.partial(layers.linear, std=std, rngs=rngs)
        self.in_conv = nnx.List([nnx.LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs),
                                 linear(width, width, dtype=dtype), layers.gelu])
        self.out_conv = nnx.List([linear(width, width // 2, dtype=dtype), layers.gelu,
                                  linear(width // 2, width // 4, dtype=dtype), layers.gelu,
                                  linear(width // 4, 2, dtype=jnp.float32)])

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """Predicts.

        Args:
          x: [B, N, D], patch tokens alone.
          stays: [B, N] float32, 0 of tokens that are masked: they are no part of the mean. None: all stay.

        Returns:
          [B, N, 2] float32, log-probabilities of staying and of going.
        """
        for layer in self.in_conv:
            x = layer(x)
        local, common = jnp.split(x, 2, axis=-1)
        mask = jnp.ones(x.shape[:2], jnp.float32) if mask is None else mask
        total = jnp.maximum(mask.sum(1), 0.5)  # of an image whose tokens are all masked the mean is 0
        mean = jnp.einsum('bnd,bn->bd', common, mask, preferred_element_type=jnp.float32) / total[:, None]
        mean = jnp.broadcast_to(mean[:, None].astype(x.dtype), common.shape)
        x = jnp.concatenate([local, mean], axis=-1)
        for layer in self.out_conv:
            x = layer(x)
        return jax.nn.log_softmax(x.astype(jnp.float32))


def predictor_macs(tokens: int, width: int) -> int:
    """Multiply-accumulates of one predictor on one image."""
    return tokens * (width * width + width * (width // 2) + (width // 2) * (width // 4) + (width // 4) * 2)


def predictor_parameters(width: int) -> int:
    """Parameters of one predictor."""
    half, quarter = width // 2, width // 4
    return 2 * width + (width + 1) * width + (width + 1) * half + (half + 1) * quarter + (quarter + 1) * 2
