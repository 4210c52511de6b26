"""Random erasing, mixup, cutmix and label smoothing, on the devices inside the jitted step.

All randomness comes from a PRNG key. Images are mixed within groups of consecutive images, one group per device. An
image and its partner belong to the same group, so no pixels move between devices. Each group has one lambda.

Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; random erasing, arXiv 1708.04896; as in timm 0.4.12.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_ERASED_AREA = (0.02, 1 / 3)            # fraction of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)         # range of height / width, log-uniform
_ERASING_TRIES = 10                     # attempts to draw a box that fits into the image


class Mixing(NamedTuple):
    """Settings of `mix_batch`."""

    erase: float      # probability that a box of an image is erased
    mixup: float      # alpha for mixup, where lambda ~ Beta(alpha, alpha); 0: no mixup
    cutmix: float     # alpha for cutmix; 0: no cutmix
    switch: float     # probability of cutmix if mixup and cutmix are on
    smoothing: float  # label smoothing: target weight spread uniformly over all classes


class Boxes(NamedTuple):
    """Rectangles of pixels, top <= row < bottom and left <= column < right; each field is int32 [N]."""

    top: Array
    bottom: Array
    left: Array
    right: Array

    def inside(self, height: int, width: int) -> Array:
        """Returns the masks of the boxes, bool [N, height, width]."""
        rows, columns = jnp.arange(height), jnp.arange(width)
        high = (self.top[:, None] <= rows) & (rows < self.bottom[:, None])
        wide = (self.left[:, None] <= columns) & (columns < self.right[:, None])
        return high[:, :, None] & wide[:, None, :]


def mix_batch(images: Array, labels: Array, key: Array, mixing: Mixing, *, classes: int,
              groups: int = 1) -> tuple[Array, Array]:
    """Erases boxes, smooths the labels, and mixes each image with its partner.

    Args:
      images: float32 [B, H, W, C], normalised.
      labels: int [B].
      key: PRNG key.
      mixing: settings.
      classes: number of classes L.
      groups: number of devices that the batch is divided among. Images are mixed within equal groups of consecutive
        images. The number determines the partners and random draws of mixup and cutmix, so the results of a run depend
        on it. Erasing and smoothing do not.

    Returns:
      Images, and targets float32 [B, L].
    """
    erase_key, mix_key = jax.random.split(key)
    targets = smooth_targets(labels, classes, mixing.smoothing)
    if mixing.erase:
        images = random_erasing(images, erase_key, mixing.erase)
    if mixing.mixup or mixing.cutmix:
        images, targets = blend(images, targets, *draw_shares(mix_key, mixing, groups, *images.shape[1:3]))
    return images, targets


def smooth_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """Maps labels, int [B], to smoothed targets, float32 [B, L]."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes


def blend(images: Array, targets: Array, own: Array, pixels: Array) -> tuple[Array, Array]:
    """Mixes each image with its partner, the image at the mirrored position in the group.

    The middle image of an odd group is its own partner.

    Args:
      images: [B, H, W, C], in G groups of consecutive images.
      targets: [B, L].
      own: [G], weight of an image's own target; the weight of the partner's target is 1 - own.
      pixels: [G, H, W], weight of an image's own pixels.

    Returns:
      Mixed images and targets.
    """
    def mixed(x, share):
        grouped = x.reshape(len(own), -1, *x.shape[1:])  # [G, B / G, ...]
        return (grouped * share + grouped[:, ::-1] * (1 - share)).reshape(x.shape)

    return mixed(images, pixels[:, None, :, :, None]), mixed(targets, own[:, None, None])


def draw_shares(key: Array, mixing: Mixing, groups: int, height: int, width: int) -> tuple[Array, Array]:
    """Draws the weights `own` and `pixels` of `blend` for mixup or cutmix, with one lambda for each group.

    With cutmix, `own` is the fraction of the image outside the box, after the box is clipped at the border.
    """
    choice, radius, turn, row, column = jax.random.uniform(key, (5, groups))  # one draw compiles to one kernel
    cut = choice < (mixing.switch if mixing.mixup and mixing.cutmix else mixing.cutmix > 0)
    lam = symmetric_beta(radius, turn, jnp.where(cut, mixing.cutmix, mixing.mixup))
    rows, columns = (row * height).astype(jnp.int32), (column * width).astype(jnp.int32)
    outside = 1.0 - cut_boxes(lam, rows, columns, height, width).inside(height, width)
    return (jnp.where(cut, outside.mean(axis=(1, 2)), lam),
            jnp.where(cut[:, None, None], outside, lam[:, None, None]))


def cut_boxes(lam: Array, rows: Array, columns: Array, height: int, width: int) -> Boxes:
    """Returns cutmix boxes [N] around centres. The area of a box before clipping at the border is 1 - lambda."""
    halves = [(side * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2 for side in (height, width)]
    top, bottom = (jnp.clip(rows + half, 0, height) for half in (-halves[0], halves[0]))
    left, right = (jnp.clip(columns + half, 0, width) for half in (-halves[1], halves[1]))
    return Boxes(top, bottom, left, right)


def symmetric_beta(radius: Array, turn: Array, a: Array) -> Array:
    """Transforms two independent uniform draws to a draw from Beta(a, a), a > 0, in closed form.

    `jax.random.beta` uses a rejection loop, which needs communication between devices in each iteration.

    Source: R. W. Bailey, Polar generation of random variates with the t-distribution, 1994. T has 2a degrees of
    freedom; the result is (1 + T / sqrt(2a + T^2)) / 2.
    """
    near, cosine = radius ** (1 / a), jnp.cos(2 * math.pi * turn)
    far = (1 - near) * cosine**2
    return (1 + jnp.sign(cosine) * jnp.sqrt(far / (near + far))) / 2


def random_erasing(images: Array, key: Array, probability: float) -> Array:
    """Fills a random box of each image with noise from N(0, 1). An image is changed with the given probability."""
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    erased = erasing_boxes(box_key, probability, batch, height, width).inside(height, width)
    return jnp.where(erased[..., None], jax.random.normal(noise_key, images.shape), images)


def erasing_boxes(key: Array, probability: float, count: int, height: int, width: int) -> Boxes:
    """Draws a box for each image: the first of several draws that fits.

    The box is empty if no draw fits, or with probability 1 - `probability`.
    """
    draws = jax.random.uniform(key, (2 * _ERASING_TRIES + 3, count))
    area = height * width * _between(_ERASED_AREA, draws[:_ERASING_TRIES])
    aspect = jnp.exp(_between([math.log(end) for end in _ERASED_ASPECT], draws[_ERASING_TRIES:-3]))
    gate, row, column = draws[-3:]
    high, wide = (jnp.round(jnp.sqrt(square)).astype(jnp.int32) for square in (area * aspect, area / aspect))
    fits = (high < height) & (wide < width)  # [tries, N]
    erased, first = (gate < probability) & fits.any(axis=0), fits.argmax(axis=0)
    high, wide = (jnp.where(erased, jnp.take_along_axis(side, first[None], axis=0)[0], 0) for side in (high, wide))
    top, left = ((at * (free + 1)).astype(jnp.int32) for at, free in ((row, height - high), (column, width - wide)))
    return Boxes(top, top + high, left, left + wide)


def _between(ends, draws):
    return ends[0] + (ends[1] - ends[0]) * draws
