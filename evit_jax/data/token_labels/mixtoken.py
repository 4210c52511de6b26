"""Sparse targets for patches, and MixToken, which swaps patches between two images.

All randomness comes from a PRNG key. Images are mixed within groups of consecutive images, as in `transforms.mixing`.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.data.transforms import mixing


class Sparse(NamedTuple):
    """Targets over L classes. K classes have explicit values."""

    value: Array  # [..., K] float32, added to the targets of the classes in `index`
    index: Array  # [..., K] int32, classes; the values of repeated classes are summed
    floor: Array  # [...] float32, added to the target of every class


def smoothed(value: Array, index: Array, *, classes: int, smoothing: float) -> Sparse:
    """Returns smoothed targets for the values of a label map (see `TokenTargets`).

    The values sum to less than 1; the difference is spread over all classes. Smoothing follows TokenLabeling: the
    targets then sum to 1 + smoothing / classes.

    Args:
      value: [..., K] float32.
      index: [..., K] int, classes.
      classes: number of classes L.
      smoothing: label smoothing: target weight spread uniformly over all classes.
    """
    on, off = 1 - smoothing + smoothing / classes, smoothing / classes
    return Sparse(value * on, index, (1 - value.sum(-1)) / classes * on + off)


def dense(targets: Sparse, classes: int) -> Array:
    """Returns the targets as a dense array, float32 [..., L]."""
    named = jax.nn.one_hot(targets.index, classes, dtype=jnp.float32) * targets.value[..., None]
    return named.sum(-2) + targets.floor[..., None]


def mix_batch(batch: dict, key: Array, *, grid: tuple[int, int], classes: int, smoothing: float,
              groups: int = 1) -> tuple[Array, Sparse, Array]:
    """Computes the targets of a batch under MixToken, and the patches that the model swaps.

    Args:
      batch: values and classes as in `TokenTargets`: label_value and label_index [B, K] for whole images, token_value
        and token_index [B, P, K] for their patches in row-major order.
      key: PRNG key.
      grid: rows and columns of patches; their product is the number of patches P.
      classes: number of classes L.
      smoothing: label smoothing: target weight spread uniformly over all classes.
      groups: number of groups; images are mixed within a group, as in `mixing.mix_batch`.

    Returns:
      The targets of the class token, float32 [B, L]; the targets of the patches; and a mask of the swapped patches,
      bool [groups, P].
    """
    labels, tokens = (smoothed(batch[f'{kind}_value'].astype(jnp.float32), batch[f'{kind}_index'], classes=classes,
                               smoothing=smoothing) for kind in ('label', 'token'))
    swap = draw_swaps(key, grid, groups)
    return *mix_targets(labels, tokens, swap, classes=classes), swap


def draw_swaps(key: Array, grid: tuple[int, int], groups: int) -> Array:
    """Draws a box on the token grid for each group. A mixed image takes the patches in the box from its partner.

    Returns:
      A mask of the box, bool [G, P] in row-major order. Lambda is the fraction of False values.
    """
    height, width = grid
    radius, turn, row, column = jax.random.uniform(key, (4, groups))
    lam = mixing.symmetric_beta(radius, turn, jnp.ones(()))
    rows, columns = (row * height).astype(jnp.int32), (column * width).astype(jnp.int32)
    return mixing.cut_boxes(lam, rows, columns, height, width).inside(height, width).reshape(groups, height * width)


def mix_targets(labels: Sparse, tokens: Sparse, swap: Array, *, classes: int) -> tuple[Array, Sparse]:
    """Mixes the targets of images that swap patches with their partner.

    The partner is the image at the mirrored position in the group.

    Args:
      labels: targets of whole images, [B, K].
      tokens: targets of patches, [B, P, K].
      swap: bool [G, P], the swapped patches of each group of consecutive images.
      classes: number of classes L.

    Returns:
      The targets of the class token, float32 [B, L], a mean weighted by the fraction of patches from each image; and
      the targets of the patches, swapped like the patches.
    """
    def grouped(x):
        return x.reshape(len(swap), -1, *x.shape[1:])  # [G, B / G, ...]

    def swapped(x):
        own = grouped(x)
        return jnp.where(swap.reshape(len(swap), 1, -1, *[1] * (x.ndim - 2)), own[:, ::-1], own).reshape(x.shape)

    share, own = 1 - swap.mean(axis=1)[:, None, None], grouped(dense(labels, classes))
    mixed = own * share + own[:, ::-1] * (1 - share)
    return mixed.reshape(-1, classes), Sparse(*map(swapped, tokens))
