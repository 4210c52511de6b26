"""Embedding of patches: the convolutions of a stem, the patch projection, and MixToken."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.activations import gelu

convolution_init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default; timm uses it too


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

    def __init__(self, stem: Sequence[Convolution], patch_side: int, width: int, *, bias: bool = True, dtype,
                 rngs: nnx.Rngs):
        self.patch_side = patch_side
        self.stem = nnx.List([convolution.layer(dtype=dtype, rngs=rngs) for convolution in stem])
        # Instance norm over the pixels of an image removes the colour and brightness of its background.
        self.norms = nnx.List([nnx.InstanceNorm(convolution.channels_out, dtype=dtype, rngs=rngs)
                               for convolution in stem])
        channels = stem[-1].channels_out if stem else 3
        self.proj = nnx.Linear(channels * patch_side**2, width, use_bias=bias, kernel_init=convolution_init,
                               dtype=dtype, rngs=rngs)

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
