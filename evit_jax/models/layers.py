"""Layers shared by the vision transformers: attention, MLP, drop path, patch embedding, position embedding."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

convolution_init = nnx.initializers.variance_scaling(1 / 3, 'fan_in', 'uniform')  # PyTorch's default, as in timm
_MASK_EPSILON = 1e-6  # of DynamicViT's masked softmax


def linear(features_in: int, features_out: int, *, bias: bool = True, std: float = 0.02, dtype,
           rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with DeiT's initial values: truncated normal, zero bias."""
    return nnx.Linear(features_in, features_out, use_bias=bias, dtype=dtype, rngs=rngs,
                      kernel_init=nnx.initializers.truncated_normal(stddev=std))


class Attention(nnx.Module):
    """Multi-head self-attention that shows where the class token looks, and its keys."""

    def __init__(self, width: int, heads: int, *, qkv_bias: bool = True, std: float = 0.02, dtype,
                 rngs: nnx.Rngs):
        if width % heads:
            raise ValueError(f'width {width} is not divisible by {heads} heads')
        self.heads = heads
        self.qkv = linear(width, 3 * width, bias=qkv_bias, std=std, dtype=dtype, rngs=rngs)
        self.proj = linear(width, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, rows: int | None = None, size: Array | None = None,
                 mask: Array | None = None) -> tuple[Array, Array, Array]:
        """Attends among the tokens.

        Args:
          x: [B, N, D], class token first.
          rows: so many of the first tokens look at all; None: every one does.
          size: [B, N] float32: each token counts as so many alike (ToMe's proportional attention).
          stays: [B, N] float32: where it is 0, no other token sees this one.

        Returns:
          The output of the rows that look, [B, N, D]; and, means over the heads, float32, the class token's row of the
          softmax [B, N] and the keys [B, N, d]. Under `jax.jit` neither costs anything where nobody reads it.
        """
        mixed, class_row, keys = jax.lax.platform_dependent(
            self.qkv(x), size, mask, tpu=functools.partial(_head_by_head, heads=self.heads, rows=rows),
            default=functools.partial(_heads_at_once, heads=self.heads, rows=rows))
        return self.proj(mixed), class_row, keys


def _heads_at_once(qkv, size, mask, heads, rows):
    """Attention of all heads in the same products, from [B, N, 3 D], to what `Attention` returns."""
    # Heads in front before the products: einsum over [B, N, H, d] takes 1.6 times as long on a CPU.
    q, k, v = qkv.reshape(*qkv.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)  # each [B, H, N, d]
    size, mask = (None if of is None else of[:, None] for of in (size, mask))
    q = _scaled(q[:, :, :rows])
    mixed = _attended(q, k, v, size, mask).transpose(0, 2, 1, 3)
    class_row = class_attention(q[:, :, 0], k, size).mean(axis=1)
    return mixed.reshape(*mixed.shape[:2], -1), class_row, k.mean(axis=1, dtype=jnp.float32)


def _head_by_head(qkv, size, mask, heads, rows):
    """The same, without an array of all heads in front: a TPU takes longer to make it than to multiply."""
    parts = jnp.split(qkv, 3 * heads, axis=-1)  # each [B, N, d]
    each = [(_scaled(q[:, :rows]), k, v)
            for q, k, v in zip(parts[:heads], parts[heads:2 * heads], parts[2 * heads:], strict=True)]
    mixed = [_attended(q, k, v, size, mask) for q, k, v in each]
    class_row = sum(class_attention(q[:, 0], k, size) for q, k, _ in each) / heads
    keys = sum(k.astype(jnp.float32) for _, k, _ in each) / heads
    return jnp.concatenate(mixed, axis=-1), class_row, keys


def _scaled(q):
    return q * q.shape[-1]**-0.5


def _attended(q, k, v, size, mask):
    """Softmax of the products, on the values: q [..., R, d], k and v [..., N, d]; size, stays [..., N]."""
    logits = jnp.einsum('...qd,...kd->...qk', q, k, preferred_element_type=jnp.float32)
    # Dividing after the product with V spares a pass over the N x N weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    if size is not None:
        weights = weights * size[..., None, :]
    if mask is not None:
        rows, n = weights.shape[-2:]
        weights = weights * _visible(mask)[..., :rows, :] + _MASK_EPSILON / n
    total = weights.sum(axis=-1, keepdims=True)
    mixed = jnp.einsum('...qk,...kd->...qd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return mixed.astype(v.dtype)


def _visible(mask: Array) -> Array:
    """Which token each one sees: those that stay, and itself. [..., N] to [..., N, N].

    Source: DynamicViT, `softmax_with_policy`.
    """
    itself = jnp.eye(mask.shape[-1], dtype=mask.dtype)
    return mask[..., None, :] * (1 - itself) + itself


def class_attention(q: Array, k: Array, size: Array | None = None) -> Array:
    """Where the class token looks: its row of the softmax.

    A product of its own, so that no N x N matrix has to be kept for it.

    Args:
      q: [..., d], scaled.
      k: [..., N, d].
      size: [..., N] float32, as `Attention` takes it.

    Returns:
      [..., N] float32.
    """
    logits = jnp.einsum('...d,...nd->...n', q, k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits if size is None else logits + jnp.log(size))


def gelu(x: Array) -> Array:
    """The exact one, in float32. `jax.nn.gelu` asks for `erfc`, which takes about twice as long on CPU and TPU."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """The approximation of GELU by tanh, in float32."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """The approximation of GELU by a sigmoid, as in CLIP, in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


ACTIVATIONS = {'gelu': gelu, 'gelu_tanh': gelu_tanh, 'quick_gelu': quick_gelu}


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
    """Drops a residual branch for a random share of the images, and scales up the rest.

    Args:
      x: [B, ...] the branch.
      key: None leaves the branch as it is (evaluation).
    """
    if key is None or rate == 0:
        return x
    mask = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(mask, x / (1 - rate), 0).astype(x.dtype)


class Convolution(NamedTuple):
    """A convolution of a stem, which a norm follows."""

    side: int
    stride: int
    channels_in: int
    channels_out: int

    @property
    def weights(self) -> int:
        """How many; for each pixel that comes out, as many multiply-accumulates."""
        return self.side**2 * self.channels_in * self.channels_out

    def layer(self, *, bias: bool = False, dtype, rngs: nnx.Rngs) -> nnx.Conv:
        """Its pixels are those at every `stride`th place of the image, the border filled with 0."""
        return nnx.Conv(self.channels_in, self.channels_out, (self.side, self.side), strides=self.stride,
                        padding=self.side // 2, use_bias=bias, dtype=dtype, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Patches to tokens: one linear map of each patch, behind overlapping convolutions where there is a stem."""

    def __init__(self, stem: Sequence[Convolution], patch_side: int, width: int, *, dtype, rngs: nnx.Rngs):
        self.patch_side = patch_side
        self.stem = nnx.List([convolution.layer(dtype=dtype, rngs=rngs) for convolution in stem])
        # Over the pixels of an image: colour and brightness of the ground would else drown the strokes.
        self.norms = nnx.List([nnx.InstanceNorm(convolution.channels_out, dtype=dtype, rngs=rngs)
                               for convolution in stem])
        channels = stem[-1].channels_out if stem else 3
        self.proj = nnx.Linear(channels * patch_side**2, width, kernel_init=convolution_init, dtype=dtype, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        for convolution, norm in zip(self.stem, self.norms, strict=True):
            images = gelu(norm(convolution(images)))
        return self.proj(to_patches(images, self.patch_side))


def swap_patches(x: Array, swap: Array) -> Array:
    """MixToken: takes some patches of each image from its partner, its mirror position in a group of neighbours.

    Args:
      x: [B, P, D], of G equal groups of neighbours (the middle of an odd group is its own partner).
      swap: bool [G, P], or [P] for one group.

    Source: Token Labeling, arXiv 2104.10858, section 3.3.
    """
    swap = jnp.atleast_2d(swap)
    grouped = x.reshape(len(swap), -1, *x.shape[1:])  # [G, B / G, P, D]
    return jnp.where(swap[:, None, :, None], grouped[:, ::-1], grouped).reshape(x.shape)


def to_patches(images: Array, size: int) -> Array:
    """[B, H, W, C] -> [B, N, size * size * C], patches in row-major order."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    x = images.reshape(batch, rows, size, columns, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * columns, size * size * channels)


def resize_positions(grid: Array, size: int) -> Array:
    """Resizes a square grid of position embeddings bicubically, as PyTorch does.

    That is `align_corners=False`, a = -0.75, no antialias, borders repeated.

    Args:
      grid: [N, D], row-major.
      size: rows (and columns) wanted.

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
    """The [new, old] matrix of a bicubic resize in one direction."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    left = np.floor(at).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(at - (left + tap))
        near = (a + 2) * x**3 - (a + 3) * x**2 + 1
        far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        np.add.at(weights, (np.arange(new), np.clip(left + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return weights.astype(np.float32)
