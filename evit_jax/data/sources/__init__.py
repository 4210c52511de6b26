"""Where examples come from. A source knows how many there are and hands out the i-th."""

import difflib
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import tensorflow_datasets as tfds

from evit_jax.data import splits
from evit_jax.data.fingerprint import digest
from evit_jax.data.sources import digits, folder_layout
from evit_jax.data.sources.folder import FolderSource
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.data.sources.tfds_source import TfdsSource
from evit_jax.data.transforms.decode import decode


class Source(Protocol):
    """A finite, random-access set of examples; pickled to Grain's worker processes.

    `source[i]` is a dict: image (encoded bytes, or uint8 [H, W, 3]), label (int), id (str, unique), and, where it is
    known, mask (encoded bytes, or uint8 [H, W]; above 127 on the object).

    Sources of this package have an attribute `split`, the split or slice that was opened, see `split_of`.

    A source may have an attribute `fingerprint`, a short text that differs where the examples or their order do, made
    without reading them: a run records it, and refuses to go on with other data. Without it the number of examples and
    the class names are compared.

    Raises:
      OSError, ValueError: `source[i]` cannot be read, or is wrong; the message names the example.
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
        self.split, self._arguments = split, (os.fspath(path), split, sizes)
        skip, builder = tfds.decode.SkipDecoding(), digits.prepare(path, sizes)
        self._records = builder.as_data_source(split, decoders={'image': skip, 'mask': skip})
        sizes_of = {name: info.num_examples for name, info in builder.info.splits.items()}
        parts = [part.split if (part.start, part.stop) == (0, sizes_of[part.split]) else f'{part.split}{part[1:]}'
                 for part in splits.parts(split, sizes_of)]
        self.fingerprint = digest(builder.info.full_name, '+'.join(parts))  # the same for each spelling of a slice
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


class _Asked(NamedTuple):
    """The arguments of `open_source`, of which each source takes those that it knows."""
    split: str
    path: str | os.PathLike
    dataset: str
    image_size: int
    num_classes: int
    seed: int
    cache: str | None


def _open_digits(asked: _Asked) -> DigitsSource:
    split = splits.resolve(asked.split, DigitsSource.splits)
    splits.names(split, DigitsSource.splits)
    _agree('digits', asked.num_classes, DigitsSource.num_classes)  # before a build that takes a minute
    return DigitsSource(asked.path, split)


def _open_generated(asked: _Asked) -> GeneratedSource:
    first, *more = splits.parts(splits.resolve(asked.split, GeneratedSource.sizes), GeneratedSource.sizes)
    if more or first.start:
        raise ValueError(f"split {asked.split!r}: generated images are cut at the end only, as in 'train[:640]'")
    return GeneratedSource(first.split, asked.image_size, asked.num_classes, asked.seed, first.stop)


def _open_folder(asked: _Asked) -> FolderSource:
    folder_layout.check_classes(os.path.expanduser(asked.path))  # before the files are listed
    return FolderSource(asked.path, asked.split, asked.cache)


_OPEN: dict[str, Callable[[_Asked], Source]] = {
    'digits': _open_digits,
    'generated': _open_generated,
    'tfds': lambda asked: TfdsSource(asked.path, asked.split, asked.dataset, asked.cache),
    'folder': _open_folder,
}


def open_source(name: str, split: str, *, path: str | os.PathLike = '', dataset: str = '', image_size: int = 224,
                num_classes: int = 0, seed: int = 0, cache: str | None = None) -> Source:
    """Opens a source by its name.

    Args:
      name: 'tfds', 'folder', 'digits' or 'generated'.
      split: 'train', or 'auto' for the split to evaluate on; of stored sources also a slice, see `splits`.
      path: folder of the data; 'digits' is built there if absent. Unused by 'generated'.
      dataset: of 'tfds', where `path` is a data_dir: 'imagenet2012', 'imagenet2012:5.1.0', 'name/config:1.0.0'.
      image_size: pixels a side of generated images; a stored source has its own, and the pipeline resizes.
      num_classes: what the model expects, a stored source must agree; 0: what the data have.
      seed: of generated images.
      cache: folder for indexes that cannot be kept beside the data.

    Raises:
      ValueError: unknown name or split, the classes differ, or the data are not as they should be.
      OSError: the data are not there, or cannot be read.
    """
    if name not in _OPEN:
        near = difflib.get_close_matches(name, _OPEN, n=1)
        hint = f'; did you mean {near[0]!r}?' if near else ''
        raise ValueError(f'unknown source {name!r}{hint} (there are {", ".join(_OPEN)})')
    source = _OPEN[name](_Asked(split, path, dataset, image_size, num_classes, seed, cache))
    _agree(name, num_classes, source.num_classes)
    if source.num_classes < 2:
        raise ValueError(f'source {name!r} has {source.num_classes} class, and a model needs two or more to tell apart')
    return source


def split_of(source: Source, asked: str) -> str:
    """The split that a source holds, for messages; the text that it was opened by where it does not tell."""
    return splits.title(getattr(source, 'split', asked))


def check_classes(name: str, path: str | os.PathLike, check: Callable[[tuple[str, ...]], None]) -> None:
    """Checks the class names of a source that takes long to open, before it is opened."""
    if name == 'digits':
        check(DigitsSource.class_names)
    elif name == 'folder':
        path = os.path.expanduser(path)
        check(folder_layout.class_names(path, folder_layout.split_folders(path)))


def _agree(name: str, wanted: int, has: int) -> None:
    if wanted not in (0, has):
        raise ValueError(f'num_classes={wanted}, but source {name!r} has {has}: set it so, or to 0')
