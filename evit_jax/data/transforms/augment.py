"""Augments RGB PIL images; a policy string selects the augmentation. All randomness comes from a numpy Generator.

Source: timm 0.4.12, `auto_augment.py` (RandAugment); DeiT III, `augment.py` (three-augment); torchvision's ColorJitter.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Augment = Callable[[Image.Image, np.random.Generator], Image.Image]

FILL = 124, 116, 104  # colour of pixels from outside the image: the mean colour of ImageNet
MAX_MAGNITUDE = 10.0
APPLY_PROBABILITY = 0.5  # probability that a drawn operation is applied
BLUR = 0.1, 2.0       # minimum and maximum radius in pixels
_BICUBIC = Image.Resampling.BICUBIC


class Op(NamedTuple):
    """An operation of RandAugment. Its level is a function of magnitude / MAX_MAGNITUDE."""
    apply: Callable                       # (picture, level) -> picture
    level: Callable = lambda share: None  # fraction in [0, 1], or in [-1, 1] if signed -> level
    signed: bool = False                  # the fraction is negative with probability 0.5


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=FILL)


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """Keeps the upper `bits` bits of each channel. 0 bits give a black image, as in timm; Pillow 13 rejects 0."""
    return ImageOps.posterize(picture, bits) if bits else Image.new('RGB', picture.size)


def _solarize_add(picture: Image.Image, added: int) -> Image.Image:
    return picture.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: type) -> Op:
    return Op(lambda picture, factor: kind(picture).enhance(factor), lambda share: 1 + share * 0.9, signed=True)


# All effects grow with the magnitude (timm's increasing set). The order of the arithmetic is that of timm, because some
# levels are truncated to integers.
OPS = {
    'AutoContrast': Op(lambda picture, _: ImageOps.autocontrast(picture)),
    'Equalize': Op(lambda picture, _: ImageOps.equalize(picture)),
    'Invert': Op(lambda picture, _: ImageOps.invert(picture)),
    'Rotate': Op(lambda picture, degrees: picture.rotate(degrees, _BICUBIC, fillcolor=FILL),
                 lambda share: share * 30, signed=True),
    'PosterizeIncreasing': Op(_posterize, lambda share: 4 - int(share * 4)),
    'SolarizeIncreasing': Op(ImageOps.solarize, lambda share: 256 - int(share * 256)),
    'SolarizeAdd': Op(_solarize_add, lambda share: int(share * 110)),
    'ColorIncreasing': _enhance(ImageEnhance.Color),
    'ContrastIncreasing': _enhance(ImageEnhance.Contrast),
    'BrightnessIncreasing': _enhance(ImageEnhance.Brightness),
    'SharpnessIncreasing': _enhance(ImageEnhance.Sharpness),
    'ShearX': Op(lambda picture, by: _affine(picture, 1, by, 0, 0, 1, 0), lambda share: share * 0.3, signed=True),
    'ShearY': Op(lambda picture, by: _affine(picture, 1, 0, 0, by, 1, 0), lambda share: share * 0.3, signed=True),
    'TranslateXRel': Op(lambda picture, by: _affine(picture, 1, 0, by * picture.width, 0, 1, 0),
                        lambda share: share * 0.45, signed=True),
    'TranslateYRel': Op(lambda picture, by: _affine(picture, 1, 0, 0, 0, 1, by * picture.height),
                        lambda share: share * 0.45, signed=True),
}
_NAMES = tuple(OPS)

# Geometric operation -> function from a position in the output to its position in the input, as fractions of width and
# height. The aspect is width / height.
_SOURCE_POSITIONS = {
    'Rotate': lambda x, y, degrees, aspect: _turned(x, y, math.radians(degrees), aspect),
    'ShearX': lambda x, y, by, aspect: (x + by * y / aspect, y),
    'ShearY': lambda x, y, by, aspect: (x, y + by * x * aspect),
    'TranslateXRel': lambda x, y, by, aspect: (x + by, y),
    'TranslateYRel': lambda x, y, by, aspect: (x, y + by),
}

DrawnOps = tuple[tuple[str, float], ...]  # (name, signed fraction of MAX_MAGNITUDE) of each operation in order


def _turned(x, y, angle, aspect):
    x, y, cosine, sine = (x - 0.5) * aspect, y - 0.5, math.cos(angle), math.sin(angle)
    return (cosine * x - sine * y) / aspect + 0.5, sine * x + cosine * y + 0.5


def source_positions(x: np.ndarray, y: np.ndarray, ops: DrawnOps, *,
                     aspect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps positions in the augmented image to positions in the original, as fractions of width and height.

    Args:
      aspect: width / height of the image.

    Returns:
      x, y, and a bool array that is False for positions from outside the original.
    """
    inside = np.ones(np.shape(x), bool)
    for name, share in reversed(ops):
        if name in _SOURCE_POSITIONS:
            x, y = _SOURCE_POSITIONS[name](x, y, OPS[name].level(share), aspect)
            inside = inside & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return x, y, inside


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Draws `count` operations uniformly, with replacement, and applies each with probability 0.5.

    Args:
      magnitude: mean magnitude, in [0, MAX_MAGNITUDE].
      deviation: standard deviation of the magnitude. Each operation has its own magnitude, which is clipped.
      count: number of operations drawn for an image.

    Raises:
      ValueError: an argument is out of range.
    """
    magnitude: float = MAX_MAGNITUDE
    deviation: float = 0.0
    count: int = 2

    def __post_init__(self):
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(f'magnitude {self.magnitude:g} of RandAugment is outside [0, {MAX_MAGNITUDE:g}]')
        if self.deviation < 0 or self.count < 1:
            raise ValueError(f'RandAugment with {self.count} operations and a deviation of {self.deviation:g}: '
                             f'there must be at least 1, and it must not be negative')

    def draw(self, rng: np.random.Generator) -> DrawnOps:
        """Draws the operations for an image."""
        ops = []
        for index in rng.integers(len(OPS), size=self.count).tolist():
            if rng.random() < APPLY_PROBABILITY:
                share = min(max(rng.normal(self.magnitude, self.deviation), 0), MAX_MAGNITUDE) / MAX_MAGNITUDE
                negative = OPS[_NAMES[index]].signed and rng.random() < 0.5
                ops.append((_NAMES[index], -share if negative else share))
        return tuple(ops)

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        return apply_ops(picture, self.draw(rng))


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Scales brightness, contrast and saturation, in random order, by factors in [1 - strength, 1 + strength].

    Args:
      strength: at least 0. Factors are clipped at 0.

    Raises:
      ValueError: the strength is negative.
    """
    strength: float

    def __post_init__(self):
        if self.strength < 0:
            raise ValueError(f'colour_jitter={self.strength:g} is negative: use 0 for none')

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        if self.strength:
            kinds = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
            for i in rng.permutation(3).tolist():
                picture = kinds[i](picture).enhance(rng.uniform(max(0, 1 - self.strength), 1 + self.strength))
        return picture


@dataclasses.dataclass(frozen=True)
class ThreeAugment:
    """Applies one of greyscale, solarisation at 128 and blur, and then the colour jitter."""
    jitter: ColourJitter

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        match rng.integers(3):
            case 0:
                picture = picture.convert('L').convert('RGB')
            case 1:
                picture = ImageOps.solarize(picture)
            case 2:
                picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
        return self.jitter(picture, rng)


def apply_ops(picture: Image.Image, ops: DrawnOps) -> Image.Image:
    """Applies the operations in order."""
    for name, share in ops:
        picture = OPS[name].apply(picture, OPS[name].level(share))
    return picture


def from_policy(policy: str, colour_jitter: float = 0.0) -> Augment:
    """Returns the augmentation for a policy string in the notation of timm.

    Args:
      policy: 'rand-m9-mstd0.5-inc1' for RandAugment (m: magnitude, mstd: standard deviation of the magnitude, n: number
        of operations, default 2); '3a' for DeiT III's three-augment; '' or 'none' for the colour jitter alone.
      colour_jitter: strength of the colour jitter. RandAugment ignores it, as in timm. DeiT III uses 0.3.

    Raises:
      ValueError: the policy is unknown, or a setting is unknown, repeated or invalid.
    """
    jitter = ColourJitter(colour_jitter)
    name, *settings = policy.split('-')
    if policy in ('', 'none'):
        return jitter
    if policy == '3a':
        return ThreeAugment(jitter)
    if name == 'rand':
        return _parse_rand(policy, settings)
    raise ValueError(f"unknown augmentation policy {policy!r} (there are 'rand-m9-mstd0.5-inc1', '3a', 'jitter' and "
                     "'none')")


def _parse_rand(policy: str, settings: list[str]) -> RandAugment:
    values = {}
    for setting in settings:
        match = re.fullmatch(r'(m|mstd)(\d+(?:\.\d+)?)|(n)(\d+)|(inc)(1)', setting)
        if not match or (key := match[match.lastindex - 1]) in values:
            raise ValueError(f'policy {policy!r}: {setting!r} is unknown or repeated (there are m0 to '
                             f'm{MAX_MAGNITUDE:g}, mstd0.5, n2 and inc1, as in rand-m9-mstd0.5-inc1)')
        values[key] = match[match.lastindex]
    augmentation = RandAugment(
        float(values.get('m', MAX_MAGNITUDE)), float(values.get('mstd', 0)), int(values.get('n', 2)))
    if 'inc' not in values:
        raise ValueError(f'policy {policy!r} lacks inc1: only the increasing set of operations is '
                         f'implemented; did you mean {policy + "-inc1"!r}?')
    return augmentation
