"""Source of digit pairs: two handwritten digits among clutter. The label is the larger digit.

An image is a grid of 6x6 cells of 8 pixels. Two cells hold digits, twelve hold fainter clutter, and all have noise. The
clutter is made of digits too, with the quadrants of each in random order; one piece in 24 stays whole. So the two cells
that decide the label are hard to tell from others until they have been read.

The digits are those of `digits.source_digits`. The two digits of a test image occur in no training image; the clutter
of both splits is made of training digits.
"""

import functools

import numpy as np

from evit_jax.data.fingerprint import digest
from evit_jax.data.sources import digits
from evit_jax.data.sources.base import check_index
from evit_jax.data.splits import SplitSlice

# Parameters of the drawings. Raise VERSION with every change; otherwise runs would resume on other data.
VERSION = '1.0.0'
CELL = 8                 # side of a cell in pixels, that of a source digit
GRID = 6                 # number of rows and of columns
PIECES = 12              # number of cells with clutter
CONTRAST = (0.7, 1.0)    # ink of a digit, relative to full ink
CLUTTER_CONTRAST = 0.5   # ink of the clutter
SHIFT = 1                # maximum shift of a digit in its cell, in pixels
GROUND, INK, NOISE = 40, 160, 16  # background, ink above it, and standard deviation of the noise, in levels of 0 to 255


class DigitPairsSource:
    """Digit pairs, drawn when they are read: 48x48 pixels, ten classes, with the mask of the two cells.

    Args:
      split: 'train' or 'test'.
      size: number of examples; default `sizes[split]`.
    """
    sizes = {'train': 153_600, 'test': 2_000}
    splits = tuple(sizes)
    num_classes = 10
    class_names = tuple('0123456789')
    image_size = CELL * GRID

    def __init__(self, split: str, size: int | None = None):
        self.split, self._size = split, self.sizes[split] if size is None else size
        self.slices = [SplitSlice(split, 0, self._size)]

    @property
    def fingerprint(self) -> str:
        """Digest of the version, the split and the size, which determine every image."""
        return digest('digit_pairs', VERSION, self.split, str(self._size))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict:
        check_index(index, self._size)
        rng = np.random.default_rng([self.splits.index(self.split), index])
        images, labels = _ink()
        cells = np.zeros((GRID * GRID, CELL, CELL), np.float32)
        positions = rng.permutation(GRID * GRID)[:2 + PIECES]
        pair = rng.choice(digits.split_digits(self.split), 2)
        cells[positions[:2]] = [_shifted(rng, images[number]) * rng.uniform(*CONTRAST) for number in pair]
        cells[positions[2:]] = _clutter(rng, images[rng.choice(digits.split_digits('train'), PIECES)])
        levels = GROUND + INK * _image(cells) + rng.normal(0, NOISE, (self.image_size, self.image_size))
        grey = np.clip(levels, 0, 255).astype(np.uint8)
        mask = np.zeros_like(cells, np.uint8)
        mask[positions[:2]] = 255
        return {'image': np.repeat(grey[..., None], 3, axis=-1), 'mask': _image(mask),
                'label': int(labels[pair].max()), 'id': f'{self.split}_{index:07d}'}


@functools.cache
def _ink() -> tuple[np.ndarray, np.ndarray]:
    """Returns the source digits: ink float32 [N, 8, 8] in [0, 1], and labels [N]."""
    images, labels = digits.source_digits()
    return images.astype(np.float32) / 16, labels


def _shifted(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Returns a digit [8, 8] shifted by up to `SHIFT` pixels; blank pixels fill the gap."""
    top, left = rng.integers(0, 2 * SHIFT, 2, endpoint=True)
    return np.pad(digit, SHIFT)[top:top + CELL, left:left + CELL]


def _clutter(rng: np.random.Generator, pieces: np.ndarray) -> np.ndarray:
    """Returns each digit [C, 8, 8] fainter, with its quadrants in random order."""
    half, count = CELL // 2, len(pieces)
    quadrants = pieces.reshape(count, 2, half, 2, half).swapaxes(2, 3).reshape(count, 4, half, half)
    order = rng.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    quadrants = np.take_along_axis(quadrants, order[..., None, None], axis=1).reshape(count, 2, 2, half, half)
    return CLUTTER_CONTRAST * quadrants.swapaxes(2, 3).reshape(count, CELL, CELL)


def _image(cells: np.ndarray) -> np.ndarray:
    """Puts cells [36, 8, 8] side by side, row by row: [48, 48]."""
    return cells.reshape(GRID, GRID, CELL, CELL).swapaxes(1, 2).reshape(GRID * CELL, GRID * CELL)
