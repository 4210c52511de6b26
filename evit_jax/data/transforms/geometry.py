"""From a decoded image to the model's size, and its augmentation. All that is random comes from a numpy Generator.

Source: timm 0.4.12, `RandomResizedCropAndInterpolation`; DeiT, `build_transform`, for the evaluation.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from evit_jax.data.transforms import augment
from evit_jax.data.transforms.decode import decode_mask

CROP_TRIES = 10  # to draw a part that lies within the image
SLENDER = 16     # of an image longer than this many times its width, evaluation sees the middle that is as long

_LEVELS = np.arange(256) - 127.5
_BICUBIC, _NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST


class Part(NamedTuple):
    """What is shown of an image: a rectangle, in shares of height and width, or its mirror, moved by RandAugment."""

    top: float
    left: float
    bottom: float
    right: float
    mirrored: bool
    drawn: augment.Drawn = ()


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """A random part of the image at the model's size, mirrored or not, and augmented.

    Args:
      size: pixels a side of what is returned.
      scale: least and largest share of the image's area in the part; None for the whole image, aspect ratio not kept.
      ratio: least and largest width / height of the part.
      flip: probability of the mirror image.
      policy: 'jitter' (of the digits), or one that `augment.from_policy` knows.
      colour_jitter: its strength, where the policy leaves room for one.

    Raises:
      ValueError: an argument out of range.
    """
    size: int
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: str = 'rand-m9-mstd0.5-inc1'
    colour_jitter: float = 0.0
    _augment: augment.Augment = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_size(self.size)
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f'scale={self.scale}: give the least and the largest share of the area, within (0, 1]')
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f'ratio={self.ratio}: give the least and the largest width / height, above 0')
        if not 0 <= self.flip <= 1:
            raise ValueError(f'flip={self.flip} is outside [0, 1]')
        chosen = _jitter if self.policy == 'jitter' else augment.from_policy(self.policy, self.colour_jitter)
        object.__setattr__(self, '_augment', chosen)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size, size, 3]."""
        return self.show(image, rng)[0]

    def show(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, Part]:
        """As a call, and what part it is; that the digits' jitter shifts it, by less than a patch, is left out."""
        high, wide = image.shape[:2]
        top, left, height, width = 0, 0, high, wide
        if self.scale is not None:
            top, left, height, width = random_crop(rng, high, wide, self.scale, self.ratio)
            image = image[top:top + height, left:left + width]
        # Two steps, as in the reference: `resize(box=...)` would let pixels from beyond the part in at its edges.
        picture = Image.fromarray(image).resize((self.size, self.size), _BICUBIC)
        mirrored = bool(self.flip) and rng.random() < self.flip
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        part = Part(top / high, left / wide, (top + height) / high, (left + width) / wide, mirrored)
        if not isinstance(self._augment, augment.RandAugment):
            return np.asarray(self._augment(picture, rng)), part
        drawn = self._augment.draw(rng)
        return np.asarray(augment.carry_out(picture, drawn)), part._replace(drawn=drawn)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The middle of the image at the model's size; a mask goes the same way.

    Args:
      size: pixels a side of what is returned.
      crop: share of the resized short side that is kept: the image's is first brought to int(size / crop) pixels. None
        for the whole image, aspect ratio not kept.

    Raises:
      ValueError: an argument out of range.
    """
    size: int
    crop: float | None = 224 / 256

    def __post_init__(self):
        _check_size(self.size)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f'crop={self.crop} is outside (0, 1]: give the share of the short side, or None')

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] to uint8 [size, size, 3]."""
        return resize(image, self.size) if self.crop is None else np.asarray(self._middle(image, _BICUBIC))

    def mask(self, mask: bytes | np.ndarray) -> np.ndarray:
        """Encoded, or uint8 [H, W], to bool [size, size]."""
        if self.crop is None:
            return decode_mask(mask, self.size)
        return np.asarray(self._middle(decode_mask(mask), _NEAREST))

    def _middle(self, image: np.ndarray, resample: Image.Resampling) -> Image.Image:
        picture = Image.fromarray(_shortened(image))
        short, side = int(self.size / self.crop), min(picture.size)
        width, height = (short * pixels // side for pixels in picture.size)
        left, top = (round((pixels - self.size) / 2) for pixels in (width, height))  # half to even, as torchvision
        return picture.resize((width, height), resample).crop((left, top, left + self.size, top + self.size))


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f'size={size}: an image has at least one pixel a side')


def _shortened(image: np.ndarray) -> np.ndarray:
    """Cuts the ends of a slender image off, the same from both: enlarged whole it could take gigabytes."""
    height, width = image.shape[:2]
    rows, columns = (max(0, (long - SLENDER * short) // 2) for long, short in ((height, width), (width, height)))
    return image[rows:height - rows, columns:width - columns]


def random_crop(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float],
                ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """A part whose share of the area is uniform in `scale` and whose width / height log-uniform in `ratio`.

    What does not fit is drawn again. A part of no rows or columns, too, which the reference would keep and fail on.

    Returns:
      Top, left, height, width.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_TRIES):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            return int(rng.integers(height - down + 1)), int(rng.integers(width - across + 1)), down, across
    return central_crop(height, width, ratio)


def central_crop(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """The largest part in the middle whose width / height lies in `ratio`, as top, left, height, width."""
    down = min(height, max(1, round(width / ratio[0])))
    across = min(width, max(1, round(height * ratio[1])))
    return (height - down) // 2, (width - across) // 2, down, across


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] to [size, size, 3], bicubic and antialiased as Pillow does it; aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), _BICUBIC))


def jitter(image: np.ndarray, rng: np.random.Generator, *, shift: int = 4, contrast: float = 0.25,
           brightness: float = 32.0) -> np.ndarray:
    """Label-safe augmentation for the digits: shift, contrast, brightness and order of channels. No flips.

    Args:
      image: uint8 [H, W, 3].
      rng: all that is random comes from it.
      shift: most pixels up, down, left or right; what comes in is the reflection of the border.
      contrast: the factor lies in [1 - contrast, 1 + contrast], about mid-grey.
      brightness: most that is added or taken away, of 255.
    """
    down, right, gain, lift = rng.uniform(-1, 1, 4)
    rows, columns = (_mirrored(side, shift, round(by * shift)) for side, by in zip(image.shape, (down, right)))
    columns = (columns[:, None] * 3 + rng.permutation(3)).ravel()  # [W * 3] into a row, channels reordered
    table = np.clip(_LEVELS * (1 + contrast * gain) + (127.5 + brightness * lift), 0, 255).astype(np.uint8)
    moved = image.take(rows, 0).reshape(len(rows), -1).take(columns, 1)
    # bytes.translate looks the pixels up in a third of the time that indexing the table takes.
    return np.frombuffer(moved.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(jitter(np.asarray(picture), rng))


def _mirrored(length: int, most: int, shift: int) -> np.ndarray:
    """Indices that move an axis by `shift`; beyond the border lies its mirror image, the edge itself not repeated."""
    return _mirror(length, most)[most - shift:most - shift + length]


@functools.cache
def _mirror(length: int, beyond: int) -> np.ndarray:
    last = length - 1
    return last - abs(last - abs(np.arange(-beyond, length + beyond)))
