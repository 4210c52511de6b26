"""Resizes position embeddings to other grids."""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

POSITION_RESIZES = {
    'bicubic': 'bicubic without antialias (DeiT, Hugging Face)',
    'antialiased': 'bicubic with antialias (timm)',
    'dinov2': 'bicubic without antialias, to a grid that is 0.1 larger (the code of DINOv2)'}


def resize_positions(positions: Array, old: tuple[int, int], new: tuple[int, int], *, method: str = 'bicubic',
                     prefix: int = 0) -> Array:
    """Resizes a grid of position embeddings as PyTorch does, with `align_corners=False`.

    Args:
      positions: [F + N, D]; a grid in row-major order after `prefix` embeddings that stay unchanged.
      old: number of rows and columns of the grid.
      new: number of rows and columns of the result.
      method: one of POSITION_RESIZES.
      prefix: number of embeddings of prefix tokens, F.

    Returns:
      [F + N', D].
    """
    if old == new:
        return positions
    rows, columns = (_MATRICES[method](*sides) for sides in zip(old, new))
    grid = positions[prefix:].reshape(*old, -1)
    grid = jnp.einsum('ah,bw,hwd->abd', rows, columns, grid, precision='highest')
    return jnp.concatenate([positions[:prefix], grid.reshape(new[0] * new[1], -1)])


@functools.cache
def _bicubic(old, new, *, offset=0.0, a=-0.75):
    """Returns the [new, old] matrix of a bicubic resize in one direction. The border is replicated."""
    position = (np.arange(new) + 0.5) * old / (new + offset) - 0.5
    left = np.floor(position).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        np.add.at(weights, (np.arange(new), np.clip(left + tap, 0, old - 1)), _cubic(position - (left + tap), a))
    return weights.astype(np.float32)


@functools.cache
def _antialiased(old, new):
    """Returns the [new, old] matrix of an antialiased bicubic resize in one direction. The rows sum to 1."""
    scale = max(old / new, 1.0)
    centre = (np.arange(new)[:, None] + 0.5) * old / new
    weights = _cubic((np.arange(old) + 0.5 - centre) / scale, -0.5)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _cubic(distance, a):
    """Returns the weights of the cubic convolution kernel (Keys, 1981) at the given distances."""
    x = np.abs(distance)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


_MATRICES = {'bicubic': _bicubic, 'antialiased': _antialiased, 'dinov2': functools.partial(_bicubic, offset=0.1)}
