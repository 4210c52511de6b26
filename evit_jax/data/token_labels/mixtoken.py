"""Sparse targets for patches, and MixToken, which swaps patches of two images.

All randomness comes from a key. Images are mixed within groups of consecutive images, as in `transforms.mixing`.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.data.transforms import mixing


class Sparse(NamedTuple):
    """Targets over L classes; K of them have their own values."""

    value: Array  # [..., K] float32
    index: Array  # [..., K] int32, classes; values of repeated classes are added
    floor: Array  # [...] float32, added to the target of every class


def smoothed(value: Array, index: Array, *, classes: int, smoothing: float) -> Sparse:
    """Returns smoothed targets for the values of a label map (see `TokenTargets`).

    All classes share the difference of the values to a sum of 1. Smoothing is that of TokenLabeling, where the sum
    becomes 1 + smoothing / classes.

    Args:
      value: [..., K] float32.
      index: [..., K] int, classes.
      classes: number of classes L.
      smoothing: weight that is spread over all classes.
    """
    on, off = 1 - smoothing + smoothing / classes, smoothing / classes
    return Sparse(value * on, index, (1 - value.sum(-1)) / classes * on + off)


def dense(targets: Sparse, classes: int) -> Array:
    """Returns the targets as a dense array, float32 [..., L]."""
    named = jax.nn.one_hot(targets.index, classes, dtype=jnp.float32) * targets.value[..., None]
    return named.sum(-2) + targets.floor[..., None]


def mix_batch(batch: dict, key: Array, *, patches: int, classes: int, smoothing: float,
              groups: int = 1) -> tuple[Array, Sparse, Array]:
    """Computes the targets of a batch under MixToken, and the patches that the model swaps.

    Args:
      batch: label_value and label_index [B, K] for whole images, and token_value and token_index [B, P, K] for their
        patches in row-major order: values and classes, see `TokenTargets`.
      key: source of randomness.
      patches: number of patches P.
      classes: number of classes L.
      smoothing: weight that is spread over all classes.
      groups: number of groups that are mixed within themselves, as in `mixing.mix_batch`.

    Returns:
      Targets of the class token, float32 [B, L]; targets of the patches; and the swapped patches, bool [groups, P].
    """
    labels, tokens = (smoothed(batch[f'{kind}_value'].astype(jnp.float32), batch[f'{kind}_index'], classes=classes,
                               smoothing=smoothing) for kind in ('label', 'token'))
    swap = draw_swaps(key, patches, groups)
    return *mix_targets(labels, tokens, swap, classes=classes), swap


def draw_swaps(key: Array, patches: int, groups: int) -> Array:
    """Draws the patches that a mixed image takes from its partner: a box on the token grid for each group.

    Returns:
      bool [G, P] in row-major order. Lambda is the fraction that is False.
    """
    side = math.isqrt(patches)
    radius, turn, row, column = jax.random.uniform(key, (4, groups))
    lam = mixing.symmetric_beta(radius, turn, jnp.ones(()))
    rows, columns = (row * side).astype(jnp.int32), (column * side).astype(jnp.int32)
    return mixing.cut_boxes(lam, rows, columns, side, side).inside(side, side).reshape(groups, patches)


def mix_targets(labels: Sparse, tokens: Sparse, swap: Array, *, classes: int) -> tuple[Array, Sparse]:
    """Mixes targets of images that swap patches with their partner, the image at the mirrored position of the group.

    Args:
      labels: targets of whole images, [B, K].
      tokens: targets of patches, [B, P, K].
      swap: bool [G, P], for G groups of consecutive images.
      classes: number of classes L.

    Returns:
      Targets of the class token, float32 [B, L], weighted by the fraction of patches from each image; and targets of
      the patches, each from the image that the patch comes from.
    """
    def grouped(x):
        return x.reshape(len(swap), -1, *x.shape[1:])  # [G, B / G, ...]

    def swapped(x):
        own = grouped(x)
        return jnp.where(swap.reshape(len(swap), 1, -1, *[1] * (x.ndim - 2)), own[:, ::-1], own).reshape(x.shape)

    share, own = 1 - swap.mean(axis=1)[:, None, None], grouped(dense(labels, classes))
    mixed = own * share + own[:, ::-1] * (1 - share)
    return mixed.reshape(-1, classes), Sparse(*map(swapped, tokens))
