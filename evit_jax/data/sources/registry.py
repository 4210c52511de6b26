"""Opens sources by name, and creates sources from arrays, records and folders."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from evit_jax.data import splits
from evit_jax.data.sources import folder_layout
from evit_jax.data.sources.arrays import ArraySource
from evit_jax.data.sources.base import Source
from evit_jax.data.sources.digit_pairs import DigitPairsSource
from evit_jax.data.sources.digits_source import DigitsSource
from evit_jax.data.sources.folder import ClassFolderSource, FolderSource
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.data.sources.records import RecordSource
from evit_jax.data.sources.tfds_source import TfdsSource
from evit_jax.runtime.names import get_by_name

OBJECTS = 'custom'  # data.source of a run whose data was passed as objects


class _Request(NamedTuple):
    """Arguments of `open_source`; each source uses a subset."""
    split: str
    path: str | os.PathLike
    dataset: str
    image_size: int
    num_classes: int
    seed: int
    cache: str | None


def _open_digits(request: _Request) -> DigitsSource:
    split = splits.resolve(request.split, DigitsSource.splits)
    splits.names(split, DigitsSource.splits)
    _check_num_classes('digits', request.num_classes, DigitsSource.num_classes)  # before the build, which is slow
    return DigitsSource(request.path, split)


def _open_generated(request: _Request) -> GeneratedSource:
    split, size = _split_and_size(request.split, GeneratedSource.sizes)
    return GeneratedSource(split, request.image_size, request.num_classes, request.seed, size)


def _split_and_size(text: str, sizes: Mapping[str, int]) -> tuple[str, int]:
    """Returns the split and the number of examples of generated images, for a text such as 'train[:640]'."""
    first, *more = splits.slices(splits.resolve(text, sizes), sizes)
    if more or first.start:
        raise ValueError(f"split {text!r}: generated images are cut at the end only, as in 'train[:640]'")
    return first.split, first.stop


def _open_folder(request: _Request) -> FolderSource:
    folder_layout.check_classes(os.path.expanduser(request.path))  # checked before files are listed, which is slow
    return FolderSource(request.path, request.split, request.cache)


_OPENERS: dict[str, Callable[[_Request], Source]] = {
    'digits': _open_digits,
    'digit_pairs': lambda request: DigitPairsSource(*_split_and_size(request.split, DigitPairsSource.sizes)),
    'generated': _open_generated,
    'tfds': lambda request: TfdsSource(request.path, request.split, request.dataset, request.cache),
    'folder': _open_folder,
}


def open_source(name: str, split: str, *, path: str | os.PathLike = '', dataset: str = '', image_size: int = 224,
                num_classes: int = 0, seed: int = 0, cache: str | None = None) -> Source:
    """Opens a source by name.

    Args:
      name: 'tfds', 'folder', 'digits', 'digit_pairs' or 'generated'.
      split: 'train', or 'auto' for the split to evaluate on. Stored sources also accept slices; see `splits`. The
        generated ones accept only their beginning, as in 'train[:640]'.
      path: folder of the data. 'digits' is built there if absent; 'digit_pairs' and 'generated' ignore the path.
      dataset: name of a tfds data set if `path` is a data_dir: 'imagenet2012', 'imagenet2012:5.1.0',
        'name/config:1.0.0'.
      image_size: side of generated images in pixels. Stored images keep their size; the pipeline resizes them.
      num_classes: number of classes that the model expects. A stored source with another number raises an error; 0
        accepts any number.
      seed: seed of generated images.
      cache: folder for indexes that cannot be written to the folder of the data.

    Raises:
      ValueError: the name or split is unknown, the number of classes differs, or the data are invalid.
      OSError: the data are absent or unreadable.
    """
    if name == OBJECTS:
        raise ValueError(f'data.source={OBJECTS}: the run was trained on data that was passed as objects, which cannot '
                         'be opened by name. Give --config.data.source=folder --config.data.path=DIR or another source')
    source = get_by_name('source', name, _OPENERS)(_Request(split, path, dataset, image_size, num_classes, seed, cache))
    _check_num_classes(name, num_classes, source.num_classes)
    if source.num_classes < 2:
        raise ValueError(f'source {name!r} has {source.num_classes} class, and a model needs two or more')
    return source


def as_source(value: Any, class_names: Sequence[str] = ()) -> Source:
    """Returns a source of the examples in `value`.

    Args:
      value: one of
        - a `Source`, returned unchanged;
        - the path of a folder with one subfolder of images for each class, `path/<class>/*.jpg`;
        - a tuple (images, labels) of arrays; see `ArraySource`;
        - a sequence of records with 'image' and 'label'; see `RecordSource`.
      class_names: names of the classes in the order of their labels. They determine the labels of a folder, so pass
        `train.class_names` for a folder to evaluate on. A `Source` has its own class names.

    Raises:
      ValueError: the value is none of these or invalid, or a `Source` has other class names.
      OSError: the folder is absent or unreadable.
    """
    if isinstance(value, Source):
        if class_names and tuple(class_names) != tuple(value.class_names):
            raise ValueError(f'class_names={list(class_names)[:5]} differ from those of the source, '
                             f'{list(value.class_names)[:5]}: leave class_names out')
        return value
    if isinstance(value, str | os.PathLike):
        return ClassFolderSource(value, class_names)
    if isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], Mapping):
        return ArraySource(*value, class_names)
    if hasattr(value, '__len__') and hasattr(value, '__getitem__') and not isinstance(value, Mapping):
        return RecordSource(value, class_names)
    raise ValueError(f'cannot read examples from a {type(value).__name__}: give a tuple (images, labels), a sequence '
                     'of records with image and label, the path of a folder <class>/*.jpg, or a source')


def split_of(source: Source, requested: str) -> str:
    """Returns the split that a source holds, for messages; `requested` if the source has no attribute `split`."""
    return splits.title(getattr(source, 'split', requested))


def check_classes(name: str, path: str | os.PathLike, check: Callable[[tuple[str, ...]], None]) -> None:
    """Calls `check` with the class names of a source that is slow to open. It does not open the source."""
    if name == 'digits':
        check(DigitsSource.class_names)
    elif name == 'folder':
        path = os.path.expanduser(path)
        check(folder_layout.class_names(path, folder_layout.split_folders(path)))


def _check_num_classes(name: str, requested: int, actual: int) -> None:
    if requested not in (0, actual):
        raise ValueError(f'num_classes={requested}, but source {name!r} has {actual}: set it so, or to 0')
