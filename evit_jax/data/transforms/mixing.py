"""Random erasing, mixup and cutmix, label smoothing: on the devices, inside the jitted step.

All that is random comes from a key. Images are mixed within groups of neighbours, one group to a device: with partner
and lambda from the group, no pixel has to cross to another device.

Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; random erasing, arXiv 1708.04896; as in timm 0.4.12.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

_ERASED_AREA = (0.02, 1 / 3)            # of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)         # height / width, log-uniform
_ERASING_TRIES = 10                     # for a box that fits into the image


class Mixing(NamedTuple):
    """How much is done to a batch."""

    erase: float      # share of the images that have a box erased
    mixup: float      # both parameters of lambda's Beta distribution; 0: no mixup
    cutmix: float     # likewise
    switch: float     # share of cutmix, where mixup is on too
    smoothing: float  # weight of a target that is spread over all classes


class Boxes(NamedTuple):
    """Rectangles of pixels, top <= row < bottom and left <= column < right; each field [N] int32."""

    top: Array
    bottom: Array
    left: Array
    right: Array

    def inside(self, height: int, width: int) -> Array:
        """The pixels of an image inside each box, bool [N, height, width]."""
        rows, columns = jnp.arange(height), jnp.arange(width)
        high = (self.top[:, None] <= rows) & (rows < self.bottom[:, None])
        wide = (self.left[:, None] <= columns) & (columns < self.right[:, None])
        return high[:, :, None] & wide[:, None, :]


def mix_batch(images: Array, labels: Array, key: Array, mixing: Mixing, *, classes: int,
              groups: int = 1) -> tuple[Array, Array]:
    """Erases boxes, smooths the labels, and mixes images with their partners.

    Args:
      images: [B, H, W, C] float32, normalised.
      labels: [B] int.
      groups: equal runs of the batch that are mixed each within itself; the number of devices that share the batch.
        With mixup or cutmix on it decides partners and draws, so a run on other devices is another run; erasing and
        smoothing do not know it.

    Returns:
      Images, and targets [B, L] float32.
    """
    erase_key, mix_key = jax.random.split(key)
    targets = smooth_targets(labels, classes, mixing.smoothing)
    if mixing.erase:
        images = random_erasing(images, erase_key, mixing.erase)
    if mixing.mixup or mixing.cutmix:
        images, targets = blend(images, targets, *draw_shares(mix_key, mixing, groups, *images.shape[1:3]))
    return images, targets


def smooth_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """[B] int labels to [B, L] float32 targets, `smoothing` of the weight spread over all classes."""
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes


def blend(images: Array, targets: Array, own: Array, pixels: Array) -> tuple[Array, Array]:
    """Mixes each image with its partner: its mirror position in its group (the middle of an odd group is its own).

    Args:
      images: [B, H, W, C]; targets: [B, L]; both G groups of neighbours.
      own: [G] share of a target that stays.
      pixels: [G, H, W] share of each pixel that stays.
    """
    def mixed(x, share):
        grouped = x.reshape(len(own), -1, *x.shape[1:])  # [G, B / G, ...]
        return (grouped * share + grouped[:, ::-1] * (1 - share)).reshape(x.shape)

    return mixed(images, pixels[:, None, :, :, None]), mixed(targets, own[:, None, None])


def draw_shares(key: Array, mixing: Mixing, groups: int, height: int, width: int) -> tuple[Array, Array]:
    """What stays of targets and pixels, as `blend` takes them: one lambda a group, by mixup or by cutmix.

    For cutmix the target's share is that of the area outside the box, which the border may have clipped.
    """
    choice, radius, turn, row, column = jax.random.uniform(key, (5, groups))  # one draw: each is a kernel to compile
    cut = choice < (mixing.switch if mixing.mixup and mixing.cutmix else mixing.cutmix > 0)
    lam = symmetric_beta(radius, turn, jnp.where(cut, mixing.cutmix, mixing.mixup))
    rows, columns = (row * height).astype(jnp.int32), (column * width).astype(jnp.int32)
    outside = 1.0 - cut_boxes(lam, rows, columns, height, width).inside(height, width)
    return (jnp.where(cut, outside.mean(axis=(1, 2)), lam),
            jnp.where(cut[:, None, None], outside, lam[:, None, None]))


def cut_boxes(lam: Array, rows: Array, columns: Array, height: int, width: int) -> Boxes:
    """The boxes of cutmix: 1 - lambda of the image about a centre, clipped at the border. All arguments are [N]."""
    halves = [(side * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2 for side in (height, width)]
    top, bottom = (jnp.clip(rows + half, 0, height) for half in (-halves[0], halves[0]))
    left, right = (jnp.clip(columns + half, 0, width) for half in (-halves[1], halves[1]))
    return Boxes(top, bottom, left, right)


def symmetric_beta(radius: Array, turn: Array, a: Array) -> Array:
    """Beta(a, a), a > 0, in closed form from two independent uniform draws.

    `jax.random.beta` rejects in a loop, at each turn of which several devices have to agree.

    Source: R. W. Bailey, Polar generation of random variates with the t-distribution, 1994, T with 2a degrees of
    freedom; here (1 + T / sqrt(2a + T^2)) / 2.
    """
    near, cosine = radius ** (1 / a), jnp.cos(2 * math.pi * turn)
    far = (1 - near) * cosine**2
    return (1 + jnp.sign(cosine) * jnp.sqrt(far / (near + far))) / 2


def random_erasing(images: Array, key: Array, probability: float) -> Array:
    """Fills a box with noise N(0, 1), in this share of the images, each with a box of its own."""
    box_key, noise_key = jax.random.split(key)
    batch, height, width, _ = images.shape
    erased = erasing_boxes(box_key, probability, batch, height, width).inside(height, width)
    return jnp.where(erased[..., None], jax.random.normal(noise_key, images.shape), images)


def erasing_boxes(key: Array, probability: float, count: int, height: int, width: int) -> Boxes:
    """The box of each image: the first of some tries that is smaller than the image; empty where none is erased."""
    draws = jax.random.uniform(key, (2 * _ERASING_TRIES + 3, count))
    area = height * width * _between(_ERASED_AREA, draws[:_ERASING_TRIES])
    aspect = jnp.exp(_between([math.log(end) for end in _ERASED_ASPECT], draws[_ERASING_TRIES:-3]))
    gate, row, column = draws[-3:]
    high, wide = (jnp.round(jnp.sqrt(square)).astype(jnp.int32) for square in (area * aspect, area / aspect))
    fits = (high < height) & (wide < width)  # [tries, N]
    erased, first = (gate < probability) & fits.any(axis=0), fits.argmax(axis=0)
    high, wide = (jnp.where(erased, jnp.take_along_axis(side, first[None], axis=0)[0], 0) for side in (high, wide))
    top, left = ((at * (room + 1)).astype(jnp.int32) for at, room in ((row, height - high), (column, width - wide)))
    return Boxes(top, top + high, left, left + wide)


def _between(ends, draws):
    return ends[0] + (ends[1] - ends[0]) * draws
