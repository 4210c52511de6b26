"""Crops, resizes and augments decoded images. All randomness comes from a numpy Generator.

Source: timm 0.4.12, `RandomResizedCropAndInterpolation`; DeiT, `build_transform`, for evaluation; timm 1.0,
`ResizeKeepRatio`, for the evaluation of rectangles.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from evit_jax.data.transforms import augment
from evit_jax.data.transforms.decode import decode_mask
from evit_jax.runtime.names import get_by_name

CROP_TRIES = 10  # attempts to draw a window that lies within the image
SLENDER = 16     # maximum ratio of the sides in evaluation; the ends of a longer image are cut off

Size = int | tuple[int, int]  # side of a square, or (height, width), in pixels

_LEVELS = np.arange(256) - 127.5
_BICUBIC, _NEAREST = Image.Resampling.BICUBIC, Image.Resampling.NEAREST
# The index of a filter is its number in Pillow.
FILTERS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')
_BY_NAME = {name: Image.Resampling[name.upper()] for name in FILTERS}


class CropWindow(NamedTuple):
    """The part of an image that a training sample shows: a rectangle, as fractions of height and width."""

    top: float
    left: float
    bottom: float
    right: float
    mirrored: bool
    ops: augment.DrawnOps = ()  # operations of RandAugment, applied after cropping


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, horizontal flip and augmentation.

    Args:
      size: side of a square output, or (height, width), in pixels.
      scale: minimum and maximum area of the crop as a fraction of the image. None uses the whole image and does not
        preserve the aspect ratio.
      ratio: minimum and maximum width / height of the crop.
      flip: probability of a horizontal flip.
      policy: 'jitter' (for the digits), or a policy of `augment.from_policy`.
      colour_jitter: strength of the colour jitter; see `augment.from_policy`.

    Raises:
      ValueError: an argument is out of range.
    """
    size: Size
    scale: tuple[float, float] | None = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: str = 'rand-m9-mstd0.5-inc1'
    colour_jitter: float = 0.0
    _augment: augment.Augment = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self):
        _check_size(self.size)
        if self.scale is not None and not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f'scale={self.scale}: give the minimum and maximum fraction of the area, within (0, 1]')
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f'ratio={self.ratio}: give the minimum and the maximum width / height, above 0')
        if not 0 <= self.flip <= 1:
            raise ValueError(f'flip={self.flip} is outside [0, 1]')
        augmentation = _jitter if self.policy == 'jitter' else augment.from_policy(self.policy, self.colour_jitter)
        object.__setattr__(self, '_augment', augmentation)

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Maps uint8 [H, W, 3] to uint8 [height, width, 3]."""
        return self.crop_and_augment(image, rng)[0]

    def crop_and_augment(self, image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, CropWindow]:
        """Returns the transformed image and its window. The shift of the policy 'jitter' is not part of the window."""
        high, wide = image.shape[:2]
        top, left, height, width = 0, 0, high, wide
        if self.scale is not None:
            top, left, height, width = random_crop(rng, high, wide, self.scale, self.ratio)
            image = image[top:top + height, left:left + width]
        # Crop first, then resize, as in timm: `resize(box=...)` would mix pixels outside the window into its edges.
        picture = Image.fromarray(image).resize(height_and_width(self.size)[::-1], _BICUBIC)
        mirrored = bool(self.flip) and rng.random() < self.flip
        if mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        window = CropWindow(top / high, left / wide, (top + height) / high, (left + width) / wide, mirrored)
        if not isinstance(self._augment, augment.RandAugment):
            return np.asarray(self._augment(picture, rng)), window
        ops = self._augment.draw(rng)
        return np.asarray(augment.apply_ops(picture, ops)), window._replace(ops=ops)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Central crop of the resized image.

    Args:
      size: side of a square output, or (height, width), in pixels.
      crop: `size` as a fraction of the resized short side. The short side is resized to int(size / crop) pixels. For a
        rectangle, the image is resized to cover the rectangle of int(height / crop) x int(width / crop) pixels, as in
        timm. None uses the whole image and does not preserve the aspect ratio.
      interpolation: name of the filter of the resize, as in Pillow. All except 'nearest' are antialiased.

    Raises:
      ValueError: an argument is out of range.
    """
    size: Size
    crop: float | None = 224 / 256
    interpolation: str = 'bicubic'

    def __post_init__(self):
        _check_size(self.size)
        get_by_name('interpolation', self.interpolation, _BY_NAME)
        if self.crop is not None and not 0 < self.crop <= 1:
            raise ValueError(f'crop={self.crop} is outside (0, 1]: give the fraction of the short side, or None')

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Maps uint8 [H, W, 3] to uint8 [height, width, 3]."""
        resample = _BY_NAME[self.interpolation]
        return (resize(image, self.size, resample) if self.crop is None else
                np.asarray(self._middle(image, resample)))

    def mask(self, mask: bytes | np.ndarray) -> np.ndarray:
        """Applies the same crop to a mask. It maps encoded bytes or uint8 [H, W] to bool [height, width]."""
        if self.crop is None:
            return decode_mask(mask, height_and_width(self.size))
        return np.asarray(self._middle(decode_mask(mask), _NEAREST))

    def _middle(self, image: np.ndarray, resample: Image.Resampling) -> Image.Image:
        picture = Image.fromarray(_shortened(image))
        high, wide = height_and_width(self.size)
        width, height = self._resized(*picture.size)
        left, top = round((width - wide) / 2), round((height - high) / 2)  # half to even, as torchvision
        return picture.resize((width, height), resample).crop((left, top, left + wide, top + high))

    def _resized(self, width, height):
        """Returns the width and the height of the resized image."""
        high, wide = (int(side / self.crop) for side in height_and_width(self.size))
        if high == wide:
            return tuple(high * side // min(width, height) for side in (width, height))
        ratio = min(height / high, width / wide)
        return round(width / ratio), round(height / ratio)


def height_and_width(size: Size) -> tuple[int, int]:
    """Returns (height, width) of a size."""
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_size(size: Size) -> None:
    if min(height_and_width(size)) < 1:
        raise ValueError(f'size={size}: an image has at least one pixel a side')


def _shortened(image: np.ndarray) -> np.ndarray:
    """Cuts off both ends of an image longer than SLENDER times its width: resizing all of it could take gigabytes."""
    height, width = image.shape[:2]
    rows, columns = (max(0, (long - SLENDER * short) // 2) for long, short in ((height, width), (width, height)))
    return image[rows:height - rows, columns:width - columns]


def random_crop(rng: np.random.Generator, height: int, width: int, scale: tuple[float, float],
                ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    """Draws a window. Its area fraction is uniform in `scale`, and its width / height is log-uniform in `ratio`.

    A window that is empty or does not fit is drawn again. After `CROP_TRIES` attempts, `central_crop` is used. (A
    departure: timm accepts an empty window and fails.)

    Returns:
      Top, left, height and width in pixels.
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
    """Returns the largest central window with width / height in `ratio`, as top, left, height, width."""
    down = min(height, max(1, round(width / ratio[0])))
    across = min(width, max(1, round(height * ratio[1])))
    return (height - down) // 2, (width - across) // 2, down, across


def resize(image: np.ndarray, size: Size, resample: Image.Resampling = _BICUBIC) -> np.ndarray:
    """Resizes [H, W, 3] to [height, width, 3] without preserving the aspect ratio."""
    height, width = height_and_width(size)
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def jitter(image: np.ndarray, rng: np.random.Generator, *, shift: int = 4, contrast: float = 0.25,
           brightness: float = 32.0) -> np.ndarray:
    """Augments digits: changes position, contrast, brightness and order of channels. A flip could change the label.

    Args:
      image: uint8 [H, W, 3].
      rng: random generator.
      shift: maximum shift in pixels in each direction; the border is reflected.
      contrast: maximum change of contrast. The factor is in [1 - contrast, 1 + contrast]; mid-grey does not change.
      brightness: maximum change of brightness, in levels of 0 to 255.
    """
    down, right, gain, lift = rng.uniform(-1, 1, 4)
    rows, columns = (_mirrored(side, shift, round(by * shift)) for side, by in zip(image.shape, (down, right)))
    columns = (columns[:, None] * 3 + rng.permutation(3)).ravel()  # indices into a row of W * 3 values
    table = np.clip(_LEVELS * (1 + contrast * gain) + (127.5 + brightness * lift), 0, 255).astype(np.uint8)
    shifted = image.take(rows, 0).reshape(len(rows), -1).take(columns, 1)
    # bytes.translate takes a third of the time of indexing the table.
    return np.frombuffer(shifted.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(jitter(np.asarray(picture), rng))


def _mirrored(length: int, max_shift: int, shift: int) -> np.ndarray:
    """Returns indices that shift an axis. The border is reflected without repeating the edge pixel."""
    return _mirror(length, max_shift)[max_shift - shift:max_shift - shift + length]


@functools.cache
def _mirror(length: int, beyond: int) -> np.ndarray:
    last = length - 1
    return last - abs(last - abs(np.arange(-beyond, length + beyond)))
