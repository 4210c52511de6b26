"""Cluttered digits, the embedded data set: a handwritten digit on a colour canvas full of pieces of other digits.

About a tenth of the 8x8-pixel patches of an image hold its digit. The rest is clutter with the same strokes and
colours. The mask of the digit is stored, so the data set shows which tokens a vision transformer should keep. It is a
`tfds` builder (array_record, no download) that runs in under a minute.

Source: `digits.npz` holds the 1,797 digits of 8x8 pixels (0-16) and their labels that scikit-learn ships as
`load_digits`, the test part of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, 1998,
UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0.
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

# Parameters of the drawings. Raise VERSION with every change, or old builds are taken for new ones.
VERSION = '1.3.0'
CANVAS = 64                    # pixels a side
DIGIT_HEIGHT = (20.0, 26.0)    # pixels for the eight rows of a digit; the strokes of pieces have the same size
DIGIT_WIDTH = (0.85, 1.1)      # width of the eight columns relative to the height
DIGIT_MARGIN = 2               # pixels between the digit's box and the border
TILT = 12.0                    # maximum rotation in degrees, both ways, of the digit and of every piece
SHEAR = 0.15                   # maximum shear, both ways
PIECES = (14, 22)              # number of pieces of other digits in an image, in front of its curves
PIECE_CELLS = (3, 4)           # rows and columns of a piece, of 8 each in a digit
CURVES = (2, 5)                # number of thin curves in an image
CURVE_WIDTH = (1, 2)           # pixels
INKS = 3                       # colours of an image; the digit has the first one
INK_CONTRAST = 90.0            # minimum luminance of an ink above the background, of 255
GROUND = 130                   # maximum of a background channel; the inks are lighter
TEXTURE = 26.0                 # amplitude of the background's blotches, of 255
NOISE = 14                     # maximum noise of a channel, both ways, of 255
JPEG_QUALITY = 95

SIZES = {'train': 20_000, 'test': 2_000}
TEST_DIGITS = 360              # number of the 1,797 source digits that are held out from training
BANK = 4_000                   # number of pieces, cut from training digits once per seed, for all clutter

_SPLITS = ('train', 'test')
_LUMA = np.array([0.299, 0.587, 0.114])


def _ramp(low: float, high: float) -> np.ndarray:
    """Returns a table from pixel value (255 for a digit's 16) to opacity: 0 below `low`, 255 above `high`, of 16."""
    return np.clip((np.arange(256) * (16 / 255) - low) / (high - low) * 255, 0, 255).astype(np.uint8)


_INK = _ramp(6, 9.5)
_GAP = _ramp(1.5, 4)


class Sprite(NamedTuple):
    """Strokes to paste onto a canvas."""
    ink: Image.Image  # mode 'L', opacity of the strokes
    gap: Image.Image  # mode 'L', opacity of the background around them, which separates them from strokes below


@functools.cache
def source_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns the handwritten digits: images uint8 [1797, 8, 8] in 0-16, and labels [1797]."""
    with np.load(pathlib.Path(__file__).with_name('digits.npz')) as file:
        return file['images'], file['labels']


@functools.cache
def split_digits(split: str) -> np.ndarray:
    """Returns the numbers of the source digits that are the objects of `split`. The splits share no digit."""
    order = np.random.default_rng(0).permutation(len(source_digits()[0]))
    return order[:TEST_DIGITS] if split == 'test' else order[TEST_DIGITS:]


@functools.lru_cache(maxsize=2)
def clutter_bank(seed: int) -> tuple[list[Sprite], np.ndarray, list[Sprite]]:
    """Returns pieces of training digits, the number of the digit that each was cut from, and curves."""
    rng = np.random.default_rng([seed, len(_SPLITS)])
    numbers = rng.choice(split_digits('train'), BANK)
    pieces = [sprite(rng, cut(rng, source_digits()[0][number])) for number in numbers]
    return pieces, numbers, [curve(rng) for _ in range(BANK // 8)]


def cut(rng: np.random.Generator, digit: np.ndarray) -> np.ndarray:
    """Returns the digit [8, 8] with only a random rectangle that holds some ink; the rest is blank."""
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
    """Returns a random arc, at most as wide as the canvas, without a gap around it."""
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
      clutter: sprites to draw below it, in this order. Those centred in the digit's box are skipped, so that the digit
        stays legible.

    Returns:
      The image, uint8 [64, 64, 3], and the object's mask, uint8 [64, 64]: 255 on the digit's strokes, 0 elsewhere.
    """
    ground, inks = _ground_and_inks(rng)
    canvas = ground.copy()
    whole = sprite(rng, digit)
    room = [CANVAS - 2 * DIGIT_MARGIN - side for side in whole.ink.size]
    left, top = (DIGIT_MARGIN + rng.integers(room, endpoint=True)).tolist()
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
    """Draws the strokes in `ink`, with a narrow gap of background around them, over what is on the canvas."""
    box = (x, y, x + strokes.ink.width, y + strokes.ink.height)
    canvas.paste(ground.crop(box), box, strokes.gap)
    canvas.paste(ink, box, strokes.ink)


def example(seed: int, split: str, index: int) -> dict:
    """Returns example `index` of `split` as the builder stores it, a function of the three arguments."""
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
    """Numbers of examples and seed of a build. The name distinguishes builds on disk."""
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
    build at the same time, the first to finish wins.

    Args:
      data_dir: folder of tfds data sets; created if absent.
      sizes: numbers of examples of 'train' and 'test'; default `SIZES`.
      seed: seed of positions, colours and clutter. The split of the source digits does not depend on it.

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
