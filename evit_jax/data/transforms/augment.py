"""Augmentation of a PIL image of mode RGB, a pure function of a numpy Generator, chosen by a policy string.

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

FILL = 124, 116, 104  # what comes in from beyond the border: the mean colour of ImageNet
MAX_MAGNITUDE = 10.0
APPLIED = 0.5         # share of the chosen operations that are carried out
BLUR = 0.1, 2.0       # radius in pixels
_BICUBIC = Image.Resampling.BICUBIC


class Op(NamedTuple):
    """An operation of RandAugment, carried out at a level that a share of MAX_MAGNITUDE stands for."""
    apply: Callable                       # (picture, level) -> picture
    level: Callable = lambda share: None  # share in [0, 1] -> level; in [-1, 1] where signed
    signed: bool = False                  # half of the time the share is negative


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=FILL)


def _posterize(picture: Image.Image, bits: int) -> Image.Image:
    """Keeps the upper `bits` of each channel. Of 0 bits comes black, as in the reference; Pillow 13 refuses that."""
    return ImageOps.posterize(picture, bits) if bits else Image.new('RGB', picture.size)


def _solarize_add(picture: Image.Image, added: int) -> Image.Image:
    return picture.point([min(value + added, 255) if value < 128 else value for value in range(256)] * 3)


def _enhance(kind: type) -> Op:
    return Op(lambda picture, factor: kind(picture).enhance(factor), lambda share: 1 + share * 0.9, signed=True)


# All grow with the magnitude (the set that timm calls increasing). The levels keep the reference's order of operations:
# they are floats, and some are cut to integers.
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

# Of those that move things: where in a square picture, in shares of its side, a place of the outcome was before.
_SOURCES = {
    'Rotate': lambda x, y, degrees: _turned(x, y, math.radians(degrees)),
    'ShearX': lambda x, y, by: (x + by * y, y),
    'ShearY': lambda x, y, by: (x, y + by * x),
    'TranslateXRel': lambda x, y, by: (x + by, y),
    'TranslateYRel': lambda x, y, by: (x, y + by),
}

Drawn = tuple[tuple[str, float], ...]  # operations to carry out, in order, each with its share of MAX_MAGNITUDE, signed


def _turned(x, y, angle):
    x, y, cosine, sine = x - 0.5, y - 0.5, math.cos(angle), math.sin(angle)
    return cosine * x - sine * y + 0.5, sine * x + cosine * y + 0.5


def sources(x: np.ndarray, y: np.ndarray, drawn: Drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where in a square picture, in shares of its side, places of what the operations made of it were before.

    Returns:
      x, y, and whether each was in the picture; other places hold what came in from beyond the border.
    """
    inside = np.ones(np.shape(x), bool)
    for name, share in reversed(drawn):
        if name in _SOURCES:
            x, y = _SOURCES[name](x, y, OPS[name].level(share))
            inside = inside & (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    return x, y, inside


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Chooses `count` of OPS uniformly, with replacement, and carries out each with probability APPLIED.

    Args:
      magnitude: 0 to MAX_MAGNITUDE.
      deviation: standard deviation of the magnitude, drawn anew for every operation and clipped.
      count: operations chosen for an image.

    Raises:
      ValueError: an argument out of range.
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

    def draw(self, rng: np.random.Generator) -> Drawn:
        """What to do to a picture."""
        drawn = []
        for chosen in rng.integers(len(OPS), size=self.count).tolist():
            if rng.random() < APPLIED:
                share = min(max(rng.normal(self.magnitude, self.deviation), 0), MAX_MAGNITUDE) / MAX_MAGNITUDE
                negative = OPS[_NAMES[chosen]].signed and rng.random() < 0.5
                drawn.append((_NAMES[chosen], -share if negative else share))
        return tuple(drawn)

    def __call__(self, picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        return carry_out(picture, self.draw(rng))


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Brightness, contrast and saturation in random order, each by a factor in [1 - strength, 1 + strength].

    Args:
      strength: at least 0; factors are never negative.
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
    """One of grey, solarized at 128, and blurred; then the jitter."""
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


def carry_out(picture: Image.Image, drawn: Drawn) -> Image.Image:
    """What the operations make of the picture."""
    for name, share in drawn:
        picture = OPS[name].apply(picture, OPS[name].level(share))
    return picture


def from_policy(policy: str, colour_jitter: float = 0.0) -> Augment:
    """The augmentation that a string in timm's manner names.

    Args:
      policy: 'rand-m9-mstd0.5-inc1' (m: magnitude, mstd: its deviation, n: operations, 2 if not given); '3a', the
        three-augment of DeiT III; '' or 'none', the colour jitter alone.
      colour_jitter: strength; unused with RandAugment, as in the reference. DeiT III has 0.3.

    Raises:
      ValueError: an unknown policy, or a setting that is unknown, twice there or out of range.
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
        found = re.fullmatch(r'(m|mstd)(\d+(?:\.\d+)?)|(n)(\d+)|(inc)(1)', setting)
        if not found or (key := found[found.lastindex - 1]) in values:
            raise ValueError(f'policy {policy!r}: {setting!r} is unknown or there twice (there are m0 to '
                             f'm{MAX_MAGNITUDE:g}, mstd0.5, n2 and inc1, as in rand-m9-mstd0.5-inc1)')
        values[key] = found[found.lastindex]
    made = RandAugment(float(values.get('m', MAX_MAGNITUDE)), float(values.get('mstd', 0)), int(values.get('n', 2)))
    if 'inc' not in values:
        raise ValueError(f'policy {policy!r} lacks inc1: only the set of operations that grow with the magnitude is '
                         f'there; did you mean {policy + "-inc1"!r}?')
    return made
