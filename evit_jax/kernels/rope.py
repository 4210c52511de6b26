"""Rotary position embeddings of two-dimensional grids, from the coordinates of the tokens.

Coordinates are data, so that they stay with their tokens when tokens are dropped, reordered or merged.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array


def grid_coordinates(rope: str, rows: int, columns: int, *, reference: int = 0) -> np.ndarray:
    """Returns the coordinates of the patches of a grid, [P, 2] float32: row and column, patches in row-major order.

    Args:
      rope: 'eva' (grid indices) or 'dinov3' (patch centres in [-1, 1], times 2 pi).
      reference: eva: side of the grid to whose coordinates others are scaled; 0: no scaling.

    Source: EVA-02, arXiv 2303.11331; DINOv3, arXiv 2508.10104.
    """
    def axis(count):
        if rope == 'dinov3':
            return 2 * math.pi * (2 * (np.arange(count) + 0.5) / count - 1)
        return np.arange(count) * (reference / count if reference else 1.0)

    return np.stack(np.meshgrid(axis(rows), axis(columns), indexing='ij'), -1).reshape(-1, 2).astype(np.float32)


def rotate(x: Array, coordinates: Array, *, base: float, interleaved: bool) -> Array:
    """Rotates pairs of channels by the angles coordinate / base^(4 i / d), i from 0 to d / 4 - 1.

    The first half of the angles belongs to the row, the second half to the column. Coordinates of 0 rotate nothing.

    Args:
      x: [B, N, H, d] queries or keys.
      coordinates: [B, N, 2] or [1, N, 2] float32.
      interleaved: True: channels 2 i and 2 i + 1 are a pair; False: channels i and i + d / 2.
    """
    d = x.shape[-1]
    frequencies = base ** -(np.arange(d // 4) * 4 / d)
    angles = coordinates[..., None] * frequencies.astype(np.float32)  # [B, N, 2, d / 4]
    angles = angles.reshape(*angles.shape[:2], 1, d // 2)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    wide = x.astype(jnp.float32)
    if interleaved:
        wide = wide.reshape(*x.shape[:-1], d // 2, 2)
        first, second = wide[..., 0], wide[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    pair = first * cos - second * sin, second * cos + first * sin
    rotated = jnp.stack(pair, -1).reshape(x.shape) if interleaved else jnp.concatenate(pair, -1)
    return rotated.astype(x.dtype)
