"""Cluttered digits, the embedded data set: a handwritten digit on a colour canvas full of pieces of other digits.

The digit covers about a tenth of the 8x8-pixel patches of an image. The other patches hold clutter with the same
strokes and colours. Each example stores the mask of its digit, which shows the tokens that a vision transformer should
keep. The data set is a `tfds` builder (array_record, no download) that runs in under a minute.

Source: `digits.npz` holds scikit-learn's `load_digits`, 1,797 digits of 8x8 pixels (0-16) with labels. They are the
test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998, UCI Machine Learning
Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import simplejpeg
import tensorflow_datasets as tfds
from PIL import Image, ImageDraw

# Parameters of the drawings. Raise VERSION with every change; otherwise an old build would be reused.
VERSION = '1.3.0'
CANVAS = 64                    # side in pixels
DIGIT_HEIGHT = (20.0, 26.0)    # height in pixels of a digit's eight rows; pieces are enlarged by the same factor
DIGIT_WIDTH = (0.85, 1.1)      # width of the eight columns relative to the height
DIGIT_MARGIN = 2               # pixels between the digit's box and the border
TILT = 12.0                    # maximum absolute rotation in degrees, for the digit and every piece
SHEAR = 0.15                   # maximum absolute shear
PIECES = (14, 22)              # number of pieces of other digits in an image; they cover the curves
PIECE_CELLS = (3, 4)           # number of rows and of columns in a piece; a digit has 8 of each
CURVES = (2, 5)                # number of thin curves in an image
CURVE_WIDTH = (1, 2)           # pixels
INKS = 3                       # number of ink colours in an image; the digit has the first one
INK_CONTRAST = 90.0            # minimum luminance of an ink above the background, in levels of 0 to 255
GROUND = 130                   # maximum of a background channel; the inks are lighter
TEXTURE = 26.0                 # amplitude of the background's blotches, in levels of 0 to 255
NOISE = 14                     # maximum absolute noise of a channel, in levels of 0 to 255
JPEG_QUALITY = 95

SIZES = {'train': 20_000, 'test': 2_000}
TEST_DIGITS = 360              # number of source digits that are held out from training; there are 1,797 in total
BANK = 4_000                   # number of clutter pieces, cut from training digits once per seed

_SPLITS = ('train', 'test')
_LUMA = np.array([0.299, 0.587, 0.114])


def _ramp(low: float, high: float) -> np.ndarray:
    """Returns a lookup table from pixel value, in 0-255, to opacity: 0 below `low` and 255 above `high`.

    `low` and `high` are on the scale of the source digits, 0-16.
    """
    return np.clip((np.arange(256) * (16 / 255) - low) / (high - low) * 255, 0, 255).astype(np.uint8)


_INK = _ramp(6, 9.5)
_GAP = _ramp(1.5, 4)


class Sprite(NamedTuple):
    """Strokes to paste onto a canvas."""
    ink: Image.Image  # mode 'L', opacity of the strokes
    gap: Image.Image  # mode 'L', opacity of the background margin that separates the strokes from those below


@functools.cache
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits: images uint8 [1797, 8, 8] in 0-16, and labels [1797]."""
    with np.load(pathlib.Path(__file__).with_name('digits.npz')) as file:
        return file['images'], file['labels']


@functools.cache
def split_digits(split: str) -> np.ndarray:
    """Returns the indices of the source digits that are used as objects in `split`. The splits share no digit."""
    order = np.random.default_rng(0).permutation(len(source_digits()[0]))
    return order[:TEST_DIGITS] if split == 'test' else order[TEST_DIGITS:]


@functools.lru_cache(maxsize=2)
def clutter_bank(seed: int) -> tuple[list[Sprite], np.ndarray, list[Sprite]]:
    """Returns pieces of training digits, the index of the source digit of each piece, and curves."""
    rng = np.random.default_rng([seed, len(_SPLITS)])
    numbers = rng.choice(split_digits('train'), BANK)
    pieces = [sprite(rng, cut(rng, source_digits()[0][number])) for number in numbers]
    return pieces, numbers, [curve(rng) for _ in range(BANK // 8)]


def cut(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Returns a digit [8, 8] that is blank outside a random rectangle. The rectangle contains some ink."""
    rows, columns = rng.integers(PIECE_CELLS[0], PIECE_CELLS[1], 2, endpoint=True)
    inked = np.argwhere(digit >= 8)
    row, column = inked[rng.integers(len(inked))] - rng.integers(0, (rows, columns))
    window = slice(max(row, 0), row + rows), slice(max(column, 0), column + columns)
    piece = np.zeros_like(digit)
    piece[window] = digit[window]
    return piece


def sprite(rng: np.random.Generator, digit: np.ndarray) -> Sprite:
    """Returns the digit [8, 8] enlarged, rotated and sheared at random."""
    down = rng.uniform(*DIGIT_HEIGHT) / 8
    across = down * rng.uniform(*DIGIT_WIDTH)
    angle, shear = math.radians(rng.uniform(-TILT, TILT)), rng.uniform(-SHEAR, SHEAR)
    cos, sin = math.cos(angle), math.sin(angle)
    (a, b), (c, d) = (cos * across, (cos * shear - sin) * down), (sin * across, (sin * shear + cos) * down)
    inked = np.argwhere(digit >= 4)
    (top, left), (bottom, right) = inked.min(0).tolist(), (inked.max(0) + 1).tolist()
    corners = [(a * x + b * y, c * x + d * y) for x in (left, right) for y in (top, bottom)]  # pixels
    (x0, x1), (y0, y1) = ((math.floor(min(axis)) - 1, math.ceil(max(axis)) + 1) for axis in zip(*corners))
    a, b, c, d = (v / (across * down) for v in (d, -b, -c, a))  # inverse: from pixels to cells
    cells = np.zeros((10, 10), np.uint8)  # blank margin, so that interpolation fades out
    cells[1:9, 1:9] = np.minimum(digit * 16.0, 255)
    field = np.asarray(Image.fromarray(cells).transform(
        (x1 - x0, y1 - y0), Image.Transform.AFFINE, (a, b, a * x0 + b * y0 + 1, c, d, c * x0 + d * y0 + 1),
        Image.Resampling.BICUBIC))
    return Sprite(Image.fromarray(_INK[field]), Image.fromarray(_GAP[field]))


def curve(rng: np.random.Generator) -> Sprite:
    """Returns a random arc without a gap around it. It is no wider than the canvas."""
    wide, tall, start, turn = rng.integers((16, 16, 0, 40), (CANVAS, CANVAS, 360, 160)).tolist()
    width = int(rng.integers(*CURVE_WIDTH, endpoint=True))
    arc = Image.new('L', (4 * wide, 4 * tall))
    ImageDraw.Draw(arc).arc((0, 0, 4 * wide - 1, 4 * tall - 1), start, start + turn, fill=255, width=4 * width)
    arc = arc.resize((wide, tall), Image.Resampling.BOX)
    return Sprite(arc, arc)


def render(rng: np.random.Generator, digit: np.ndarray, clutter: Sequence[Sprite]) -> tuple[np.ndarray, np.ndarray]:
    """Draws one example. A pure function of its arguments.

    Args:
      rng: source of positions, colours, the digit's size, and noise.
      digit: uint8 [8, 8] in 0-16, the object. It is drawn last, so nothing covers it.
      clutter: sprites to draw first, in this order. A sprite centred in the digit's box is skipped, so that the digit
        remains legible.

    Returns:
      The image, uint8 [64, 64, 3], and the object's mask, uint8 [64, 64]: 255 on the digit's strokes, 0 elsewhere.
    """
    ground, inks = _ground_and_inks(rng)
    canvas = ground.copy()
    whole = sprite(rng, digit)
    margin = [CANVAS - 2 * DIGIT_MARGIN - side for side in whole.ink.size]
    left, top = (DIGIT_MARGIN + rng.integers(margin, endpoint=True)).tolist()
    right, bottom = left + whole.ink.width, top + whole.ink.height
    centres = rng.integers(CANVAS, size=(len(clutter), 2)).tolist()
    for strokes, (x, y), ink in zip(clutter, centres, rng.integers(INKS, size=len(clutter)).tolist()):
        if not (left <= x < right and top <= y < bottom):
            _paste(canvas, ground, strokes, x - strokes.ink.width // 2, y - strokes.ink.height // 2, inks[ink])
    _paste(canvas, ground, whole, left, top, inks[0])
    mask = Image.new('L', canvas.size)
    mask.paste(whole.ink, (left, top))
    noise = rng.integers(-NOISE, NOISE, (CANVAS, CANVAS, 3), np.int8, endpoint=True)
    image = np.clip(np.asarray(canvas, np.int16) + noise, 0, 255).astype(np.uint8)
    return image, np.where(np.asarray(mask) >= 128, np.uint8(255), np.uint8(0))


def _ground_and_inks(rng) -> tuple[Image.Image, list[tuple[int, ...]]]:
    """Returns a blotchy background [64, 64] and `INKS` colours that contrast with it."""
    base = rng.uniform(0, GROUND, 3)
    inks = []
    while len(inks) < INKS:
        colours = rng.uniform(0, 255, (16, 3))
        inks += colours[(colours - base) @ _LUMA >= INK_CONTRAST].astype(int).tolist()
    blotches = np.clip(base + rng.uniform(-TEXTURE, TEXTURE, (7, 7, 3)), 0, 255).astype(np.uint8)
    return Image.fromarray(blotches).resize((CANVAS, CANVAS), Image.Resampling.BICUBIC), [*map(tuple, inks[:INKS])]


def _paste(canvas: Image.Image, ground: Image.Image, strokes: Sprite, x: int, y: int, ink) -> None:
    """Draws the strokes in `ink` on the canvas, with a narrow gap of background around them."""
    box = (x, y, x + strokes.ink.width, y + strokes.ink.height)
    canvas.paste(ground.crop(box), box, strokes.gap)
    canvas.paste(ink, box, strokes.ink)


def example(seed: int, split: str, index: int) -> dict:
    """Returns example `index` of `split` as the builder stores it. It is a pure function of its arguments."""
    images, labels = source_digits()
    objects = split_digits(split)
    number = int(objects[index % len(objects)])
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    pieces, cut_from, curves = clutter_bank(seed)
    behind = rng.integers(len(curves), size=rng.integers(*CURVES, endpoint=True)).tolist()
    before = rng.integers(len(pieces), size=rng.integers(*PIECES, endpoint=True)).tolist()
    clutter = [curves[i] for i in behind] + [pieces[i] for i in before if cut_from[i] != number]
    image, mask = render(rng, images[number], clutter)
    png = io.BytesIO()
    Image.fromarray(mask).save(png, 'PNG')
    return {
        'image': simplejpeg.encode_jpeg(image, JPEG_QUALITY, 'RGB', '444'),
        'mask': png.getvalue(),
        'label': int(labels[number]),
        'id': f'{split}_{index:05d}_digit_{number:04d}',
    }


@dataclasses.dataclass
class DigitsConfig(tfds.core.BuilderConfig):
    """Number of examples per split, and seed of a build. The config name distinguishes builds on disk."""
    train: int = SIZES['train']
    test: int = SIZES['test']
    seed: int = 0


class ClutteredDigits(tfds.core.GeneratorBasedBuilder):
    """The `tfds` builder `cluttered_digits`; `prepare` runs it."""

    VERSION = tfds.core.Version(VERSION)
    BUILDER_CONFIGS = [DigitsConfig(name='full')]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({
                'image': tfds.features.Image(shape=(CANVAS, CANVAS, 3), encoding_format='jpeg'),
                'mask': tfds.features.Image(shape=(CANVAS, CANVAS, 1), encoding_format='png'),
                'label': tfds.features.ClassLabel(num_classes=10),
                'id': tfds.features.Text(),
            }),
            supervised_keys=('image', 'label'),
            homepage='https://doi.org/10.24432/C50P49',
            license='CC BY 4.0 (source digits)',
            disable_shuffling=True,  # record i is example i
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        sizes = {'train': self.builder_config.train, 'test': self.builder_config.test}
        return {split: self._generate_examples(split, size) for split, size in sizes.items()}

    def _generate_examples(self, split: str, size: int) -> Iterator[tuple[int, dict]]:
        for index in range(size):
            stored = example(self.builder_config.seed, split, index)
            # tfds stores the bytes of a file object unchanged; encoding an array would need TensorFlow.
            yield index, stored | {key: io.BytesIO(stored[key]) for key in ('image', 'mask')}


def prepare(data_dir: str | os.PathLike, sizes: dict[str, int] | None = None, seed: int = 0) -> ClutteredDigits:
    """Builds the data set under `data_dir` unless it exists, and returns its builder.

    The build is written to a temporary folder and renamed, so an interrupted build leaves nothing. If two processes
    build at the same time, the result of the first to finish is used.

    Args:
      data_dir: folder of tfds data sets; created if absent.
      sizes: number of examples in 'train' and in 'test'; default `SIZES`.
      seed: seed of positions, colours and clutter. It does not affect the division of the source digits into splits.

    Raises:
      ValueError: `sizes` is not two positive numbers.
    """
    sizes = dict(SIZES if sizes is None else sizes)
    if set(sizes) != set(SIZES) or min(sizes.values()) < 1:
        raise ValueError(f"sizes={sizes}: give the number of examples, at least 1, of both 'train' and 'test'")
    full = sizes == SIZES and seed == 0
    name = 'full' if full else f'train{sizes["train"]}_test{sizes["test"]}_seed{seed}'
    config = 'full' if full else DigitsConfig(name=name, **sizes, seed=seed)
    make = functools.partial(ClutteredDigits, data_dir=os.fspath(data_dir), config=config, file_format='array_record')
    try:
        builder = make()
        builder.download_and_prepare()
    except OSError:
        if not make().data_path.exists():  # otherwise another process has built it meanwhile
            raise
    return make()
