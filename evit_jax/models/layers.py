"""Layers of the vision transformers: attention, MLP, drop path, patch embedding, position embedding."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from evit_jax.kernels.attention import AttentionOutput, multi_head_attention
from evit_jax.kernels.gelu import ACTIVATIONS, gelu

convolution_init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default; timm uses it too


def linear(features_in: int, features_out: int, *, bias: bool = True, std: float = 0.02, dtype,
           rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a linear layer initialised as in DeiT: truncated normal weights, zero bias."""
    return nnx.Linear(features_in, features_out, use_bias=bias, dtype=dtype, rngs=rngs,
                      kernel_init=nnx.initializers.truncated_normal(stddev=std))


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, std: float = 0.02, dtype,
                 rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f'width {width} is not divisible by {heads} heads')
        self.heads = heads
        self.qkv = linear(width, 3 * width, bias=qkv_bias, std=std, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, size: Array | None = None, mask: Array | None = None,
                 num_queries: int | None = None) -> AttentionOutput:
        """Computes attention among the tokens.

        Args:
          x: [B, N, D], class token first.
          size, mask: see `multi_head_attention`; [B, N'] for the last N' tokens. The tokens before them have 1.
          num_queries: number of first tokens that are queries; None: all.
        """
        size, mask = (None if array is None else jnp.pad(
            array, ((0, 0), (x.shape[1] - array.shape[1], 0)), constant_values=1) for array in (size, mask))
        attention = multi_head_attention(self.qkv(x), self.heads, size=size, mask=mask, num_queries=num_queries)
        return attention.replace(out=self.proj(attention.out))


class Mlp(nnx.Module):
    """Linear, activation (one of ACTIVATIONS), linear."""

    def __init__(self, width: int, hidden: int, *, activation: str = 'gelu', std: float = 0.02, dtype,
                 rngs: nnx.Rngs):
        self.activation = ACTIVATIONS[activation]
        self.fc1 = linear(width, hidden, std=std, dtype=dtype, rngs=rngs)
        self.fc2 = linear(hidden, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


def drop_path(x: Array, rate: float, key: Array | None) -> Array:
    """Drops a residual branch for random images, and scales it up for the others (stochastic depth).

    Args:
      x: [B, ...] the branch.
      key: random key; None returns the branch unchanged (evaluation).
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


class Convolution(NamedTuple):
    """A convolution of a stem, with a norm after it."""

    side: int
    stride: int
    channels_in: int
    channels_out: int

    @property
    def weights(self) -> int:
        """Number of weights; equal to the number of multiply-accumulates per output pixel."""
        return self.side**2 * self.channels_in * self.channels_out

    def layer(self, *, bias: bool = False, dtype, rngs: nnx.Rngs) -> nnx.Conv:
        """Makes the layer, with zero padding."""
        return nnx.Conv(self.channels_in, self.channels_out, (self.side, self.side), strides=self.stride,
                        padding=self.side // 2, use_bias=bias, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Embeds patches: an optional convolutional stem, then one linear map of each patch."""

    def __init__(self, stem: Sequence[Convolution], patch_side: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.patch_side = patch_side
        self.stem = nnx.List([convolution.layer(dtype=dtype, rngs=rngs) for convolution in stem])
        # Instance norm over the pixels of an image removes the colour and brightness of its background.
        self.norms = nnx.List([nnx.InstanceNorm(convolution.channels_out, dtype=dtype, rngs=rngs)
                               for convolution in stem])
        channels = stem[-1].channels_out if stem else 3
        self.proj = nnx.Linear(channels * patch_side**2, width, kernel_init=convolution_init, dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        for convolution, norm in zip(self.stem, self.norms, strict=True):
            images = gelu(norm(convolution(images)))
        return self.proj(to_patches(images, self.patch_side))


def swap_patches(x: Array, swap: Array) -> Array:
    """MixToken: replaces some patches of each image by those of its partner.

    The partner of image i in a group of n images is image n - 1 - i. The middle image of an odd group is its own.

    Args:
      x: [B, P, D], G equal groups of consecutive images.
      swap: bool [G, P], or [P] for one group; True: the patch is taken from the partner.

    Source: Token Labeling, arXiv 2104.10858, section 3.3.
    """
    swap = jnp.atleast_2d(swap)
    grouped = x.reshape(len(swap), -1, *x.shape[1:])  # [G, B / G, P, D]
    return jnp.where(swap[:, None, :, None], grouped[:, ::-1], grouped).reshape(x.shape)


def to_patches(images: Array, size: int) -> Array:
    """Reshapes [B, H, W, C] to [B, N, size * size * C], patches in row-major order."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, size * size * channels)


def resize_positions(grid: Array, size: int) -> Array:
    """Resizes a square grid of position embeddings bicubically, as PyTorch does.

    PyTorch's settings are `align_corners=False`, a = -0.75 and no antialias. The border is replicated.

    Args:
      grid: [N, D], row-major.
      size: number of rows (and columns) of the result.

    Returns:
      [size * size, D].
    """
    old = math.isqrt(grid.shape[0])
    if old == size:
        return grid
    weights = _bicubic(old, size)
    out = jnp.einsum('ah,bw,hwd->abd', weights, weights, grid.reshape(old, old, -1), precision='highest')
    return out.reshape(size * size, -1)


@functools.cache
def _bicubic(old, new, a=-0.75):
    """Returns the [new, old] matrix of a bicubic resize in one direction."""
    position = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(position).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(position - (left + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(left + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)
