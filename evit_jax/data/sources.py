"""Where examples come from. A source knows how many there are and hands out the i-th."""

import difflib
import os
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds

from evit_jax.data import digits
from evit_jax.data.decode import decode


class Source(Protocol):
    """A finite, random-access set of examples; pickled to Grain's worker processes.

    `source[i]` is a dict: image (encoded bytes, or uint8 [H, W, 3]), label (int), id (str, unique), and, where it is
    known, mask (encoded bytes, or uint8 [H, W]; above 127 on the object).
    """
    num_classes: int
    class_names: tuple[str, ...]
    image_size: int | None  # pixels a side, where all images share one

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class DigitsSource:
    """The cluttered digits, built under `path` at the first use.

    Remembers what it has decoded: reading and decoding a record costs five times what the augmentation does, and
    the whole training split is 250 MB.
    """
    splits = ('train', 'test')
    num_classes = 10
    class_names = tuple('0123456789')
    image_size = digits.CANVAS

    def __init__(self, path: str | os.PathLike, split: str, sizes: dict[str, int] | None = None):
        self._arguments = os.fspath(path), split, sizes
        skip = tfds.decode.SkipDecoding()
        self._records = digits.prepare(path, sizes).as_data_source(split, decoders={'image': skip, 'mask': skip})
        self._seen: dict[int, dict] = {}

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        example = self._seen.get(index)
        if example is None:
            record = self._records[index]
            example = {'image': decode(record['image']), 'mask': record['mask'],
                       'label': int(record['label']), 'id': record['id'].decode()}
            example['image'].flags.writeable = False
            self._seen[index] = example
        return dict(example)

    def __reduce__(self):
        return DigitsSource, self._arguments


class GeneratedSource:
    """Images made up from (seed, index): gratings whose frequencies belong to the class, so that a loss can fall.

    For trying any model at full size without a data set. Costs well under a millisecond at 224.
    """
    sizes = {'train': 10_240, 'test': 1_024}
    splits = tuple(sizes)

    def __init__(self, split: str, image_size: int, num_classes: int, seed: int = 0, size: int | None = None):
        if image_size < 1 or num_classes < 1:
            raise ValueError(f'image_size={image_size}, num_classes={num_classes}: both must be at least 1')
        self.num_classes, self.image_size = num_classes, image_size
        self.class_names = tuple(f'class {label}' for label in range(num_classes))
        self._split, self._seed, self._size = split, seed, self.sizes[split] if size is None else size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self._size:
            raise IndexError(f'example {index} of {self._size}')
        side = self.image_size
        rng = np.random.default_rng([self._seed, self.splits.index(self._split), index])
        label = int(rng.integers(self.num_classes))
        of_class = np.random.default_rng([self._seed, len(self.splits), label])
        x = np.linspace(0, 1, side, dtype=np.float32)[:, None]
        row = _wave(x * of_class.uniform(1, side / 8) + rng.random())                # [S, 1]
        column = _wave(x * of_class.uniform(1, side / 8, 3) + rng.random(3)).ravel()  # [S * 3]
        noise = np.frombuffer(rng.bytes(side * side * 3), np.uint8).reshape(side, side * 3) >> 2  # 0-63
        noise += row
        noise += column
        return {'image': noise.reshape(side, side, 3), 'label': label, 'id': f'{self._split}_{index:07d}'}


def _wave(turns: np.ndarray) -> np.ndarray:
    return (np.sin(2 * np.pi * turns) * 48 + 48).astype(np.uint8)  # 0-96


_SOURCES = {'digits': DigitsSource, 'generated': GeneratedSource}


def open_source(name: str, split: str, *, path: str | os.PathLike, image_size: int, num_classes: int, seed: int = 0,
                size: int | None = None) -> Source:
    """Opens a source by its name.

    Args:
      name: 'digits', or 'generated'.
      split: 'train' or 'test'.
      path: folder of the data sets; 'digits' is built there if absent. Unused by 'generated'.
      image_size: pixels a side of generated images; a stored source has its own, and the pipeline resizes.
      num_classes: what the model expects; a stored source must agree.
      seed: of generated images.
      size: examples of a generated source; 10,240 to train and 1,024 to test by default.

    Raises:
      ValueError: unknown name or split, or the classes differ.
    """
    if name not in _SOURCES:
        near = difflib.get_close_matches(name, _SOURCES, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'unknown source {name!r}{hint} (there are {", ".join(_SOURCES)})')
    splits = _SOURCES[name].splits
    if split not in splits:
        raise ValueError(f'source {name!r} has no split {split!r} (there are {", ".join(splits)})')
    if name == 'generated':
        return GeneratedSource(split, image_size, num_classes, seed, size)
    if num_classes != DigitsSource.num_classes:
        raise ValueError(f'num_classes={num_classes}, but source {name!r} has {DigitsSource.num_classes}: set it so')
    return DigitsSource(path, split)
