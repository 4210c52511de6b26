"""Labels of every patch: few classes with a value for each, and MixToken, which swaps patches of two images.

All that is random comes from a key; images are mixed within groups of neighbours, as in `mixing`.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.data.transforms import mixing


class Sparse(NamedTuple):
    """Targets over L classes of which K have a value of their own."""

    value: Array  # [..., K] float32
    index: Array  # [..., K] int32; a class that is named twice has the sum
    floor: Array  # [...] float32, added to the target of every class


def smoothed(value: Array, index: Array, *, classes: int, smoothing: float) -> Sparse:
    """The targets of a label map's values, of which all classes share what they lack of a sum of 1 (`TokenTargets`).

    Smoothed as in the reference, which makes a sum of 1 + smoothing / classes.
    """
    on, off = 1 - smoothing + smoothing / classes, smoothing / classes
    return Sparse(value * on, index, (1 - value.sum(-1)) / classes * on + off)


def dense(targets: Sparse, classes: int) -> Array:
    """The same as [..., L] float32."""
    named = jax.nn.one_hot(targets.index, classes, dtype=jnp.float32) * targets.value[..., None]
    return named.sum(-2) + targets.floor[..., None]


def mix_batch(batch: dict, key: Array, *, patches: int, classes: int, smoothing: float,
              groups: int = 1) -> tuple[Array, Sparse, Array]:
    """The targets of a batch under MixToken, and what the model is to swap.

    Args:
      batch: with label_value and label_index [B, K] of the whole image, and token_value and token_index [B, P, K] of
        its patches, row-major: float and int, classes of the largest values.
      groups: equal runs of the batch that are mixed each within itself, as in `mixing.mix_batch`.

    Returns:
      Targets of the class token, [B, L] float32; those of the patches; and the swaps, [groups, P] bool.
    """
    labels, tokens = (smoothed(batch[f'{of}_value'].astype(jnp.float32), batch[f'{of}_index'], classes=classes,
                               smoothing=smoothing) for of in ('label', 'token'))
    swap = draw_swaps(key, patches, groups)
    return *mix_targets(labels, tokens, swap, classes=classes), swap


def draw_swaps(key: Array, patches: int, groups: int) -> Array:
    """Which patches a mixed image has from its partner: a box on the grid of tokens, one a group.

    Returns:
      [G, P] bool, row-major. Lambda is the share that is False.
    """
    side = math.isqrt(patches)
    radius, turn, row, column = jax.random.uniform(key, (4, groups))
    lam = mixing.symmetric_beta(radius, turn, jnp.ones(()))
    rows, columns = (row * side).astype(jnp.int32), (column * side).astype(jnp.int32)
    return mixing.cut_boxes(lam, rows, columns, side, side).inside(side, side).reshape(groups, patches)


def mix_targets(labels: Sparse, tokens: Sparse, swap: Array, *, classes: int) -> tuple[Array, Sparse]:
    """The targets of images some of whose patches are their partner's: its mirror position in its group.

    Args:
      labels: [B, K], of whole images.
      tokens: [B, P, K], of patches.
      swap: [G, P] bool, of G groups of neighbours.

    Returns:
      Targets of the class token, [B, L] float32: each image's by its share of the patches; and those of the patches,
      each of the image that it is from.
    """
    def grouped(x):
        return x.reshape(len(swap), -1, *x.shape[1:])  # [G, B / G, ...]

    def swapped(x):
        own = grouped(x)
        return jnp.where(swap.reshape(len(swap), 1, -1, *[1] * (x.ndim - 2)), own[:, ::-1], own).reshape(x.shape)

    share, own = 1 - swap.mean(axis=1)[:, None, None], grouped(dense(labels, classes))
    mixed = own * share + own[:, ::-1] * (1 - share)
    return mixed.reshape(-1, classes), Sparse(*map(swapped, tokens))
