"""Sources of image files in folders: `path/train/<class>/*.jpg`, and `path/val/<class>/*.jpg` for evaluation.

The evaluation split may also be named validation/ or test/. Subfolders of a class belong to it. Links are followed, and
hidden files are skipped. If there is no evaluation split, a part of each class in train/ is held out. The part is
chosen by a hash of the file names, so a new image changes the split of few others.
"""

import collections
import concurrent.futures
import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np
from absl import logging

from evit_jax.data import splits
from evit_jax.data.classes import display_name, readable_names
from evit_jax.data.fingerprint import digest
from evit_jax.data.names import in_one_line
from evit_jax.data.progress import Progress
from evit_jax.data.sources import folder_entries, folder_layout, index_cache
from evit_jax.data.sources.base import check_index
from evit_jax.data.transforms.decode import SUFFIXES

_SCANS = 16               # classes listed in parallel
_SETTLED = 2_000_000_000  # nanoseconds; the list is not cached if a folder changed more recently
_EARLIEST = 347_155_200_000_000_000  # nanoseconds, 1981; earlier times (0, FAT's 1980-01-01) are placeholders


class FolderSource:
    """Image files of a split, sorted by name. The id of an example is its path relative to `path`, as one line of text.

    An example also has the key `path`, the relative path exactly as in the file system.

    The list of files is cached. It is reused while the classes and the modification times of all folders are unchanged,
    so it reflects added, removed and renamed files. Overwriting a file does not invalidate it, because it only holds
    names. The list is not cached if modification times are unreliable: on disk images and FUSE mounts, or if all class
    folders have the same time, a time before 1981, or a time in the future. The files are then listed at each start.

    Attributes:
      class_names: names of the class folders as `display_name` returns them, sorted.
      labels: int32 [N], labels of all examples.
      split: the split, with 'train' and 'auto' resolved.

    Args:
      split: 'train' or 'auto' (see `splits.resolve`), or a split or slice in tfds notation that names the folders.
      cache: folder for the list of files if it cannot be written to `path`.

    Raises:
      OSError: a folder or, when an example is read, its file is absent or unreadable.
      ValueError: the folders have another layout; the message describes the expected one.
    """
    image_size = None

    def __init__(self, path: str | os.PathLike, split: str, cache: str | None = None):
        self._path = os.path.expanduser(path)
        available = folder_layout.split_folders(self._path)
        self.class_names = folder_layout.class_names(self._path, available)
        self.num_classes = len(self.class_names)
        self.split = splits.resolve(split, folder_layout.labelled_splits(self._path, available))
        folder_layout.check_split(self._path, self.split, available)
        indexes = {name: self._index(name, cache) for name in splits.names(self.split, available)}
        try:
            self.slices = splits.slices(self.split, {name: len(index['name']) for name, index in indexes.items()})
        except ValueError as error:
            if self.split == split:
                raise
            raise ValueError(f'{self._path!r} has no val/, so a tenth of train/ is held out to evaluate on: {error}; '
                             'make val/<class>/, or add images') from error
        positions = [(each.split, _stratified_slice(indexes[each.split], each.start, each.stop))
                     for each in self.slices]
        self._folders = [name for name, _ in positions]
        self._ends = np.cumsum([len(rows) for _, rows in positions])
        self._names = np.concatenate([indexes[name]['name'][rows] for name, rows in positions])
        labels = {name: _labels(index, _displayed(index), self.class_names) for name, index in indexes.items()}
        self.labels = np.concatenate([labels[name][rows] for name, rows in positions])
        folder_layout.check_labels(self._path, split, self.split, self.class_names, self.labels)

    def _index(self, split: str, cache: str | None) -> index_cache.Index:
        folder = os.path.join(self._path, split)
        classes = folder_layout.class_folders(folder)
        folder_layout.check_known(folder, classes, self.class_names)
        return index_cache.load_or_build(
            f'folder_{split}', data_folder=self._path, cache=cache, build=lambda: _list(folder, classes),
            is_current=lambda index: _is_current(folder, classes, index))

    @property
    def fingerprint(self) -> str:
        """Digest of the ordered file names. Overwriting a file does not change the digest."""
        names = zip(self._folders, np.split(self._names, self._ends[:-1]))
        return digest(*(text for folder, files in names for text in (folder, b'\0'.join(files.tolist()))))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        folder = self._folders[np.searchsorted(self._ends, index, 'right')]
        return _read(self._path, os.path.join(folder, os.fsdecode(self._names[index])), self.labels[index])


class ClassFolderSource:
    """Image files of one folder with a subfolder for each class: `path/<class>/*.jpg`, sorted by name.

    The id of an example is its path relative to `path`, as one line of text. The files are listed at each start.

    Attributes:
      labels: int32 [N], labels of all examples.

    Args:
      class_names: names of the classes in the order of their labels: the names of the subfolders, or the readable names
        of ImageNet's synsets. Default: if the folder is val/, validation/ or test/ and its parent has a folder train/,
        the class names of train/; otherwise the sorted names of the subfolders.

    Raises:
      OSError: a folder or, when an example is read, its file is absent or unreadable.
      ValueError: the folder has another layout, an unknown class, or fewer than two classes.
    """
    image_size = None

    def __init__(self, path: str | os.PathLike, class_names: Sequence[str] = ()):
        self._path = os.path.abspath(os.path.expanduser(path))
        classes = folder_layout.class_folders(self._path)
        folder_layout.check_not_splits(self._path, classes)
        self.class_names = tuple(map(display_name, class_names)) or self._default_class_names(classes)
        names = readable_names(classes)
        if not {*names} <= {*self.class_names}:
            folder_layout.check_known(self._path, classes, self.class_names)
            names = [*map(display_name, classes)]
        self.num_classes = len(self.class_names)
        if self.num_classes < 2:
            raise ValueError(f'{self._path!r} has one class only ({self.class_names[0]}), and a model needs two or '
                             'more')
        index = _list(self._path, classes)
        self._names, self.labels = index['name'], _labels(index, names, self.class_names)

    def _default_class_names(self, classes: Sequence[str]) -> tuple[str, ...]:
        parent, name = os.path.split(self._path)
        if name in splits.HELD_OUT and os.path.isdir(os.path.join(parent, 'train')):
            return folder_layout.class_names(parent, ['train'])
        return tuple(sorted(map(display_name, classes)))

    @property
    def fingerprint(self) -> str:
        """Digest of the class names and the ordered file names. Overwriting a file does not change the digest."""
        return digest('class folders', *self.class_names, b'\0'.join(self._names.tolist()))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        return _read(self._path, os.fsdecode(self._names[index]), self.labels[index])


def _read(root: str, name: str, label: int) -> dict:
    with open(os.path.join(root, name), 'rb') as file:
        image = file.read()
    return {'image': image, 'label': int(label), 'id': in_one_line(name), 'path': name}


def _displayed(index: index_cache.Index) -> list[str]:
    """Returns the display names of the class folders in an index."""
    return [display_name(os.fsdecode(name)) for name in index['class']]


def _labels(index: index_cache.Index, names: Sequence[str], class_names: Sequence[str]) -> np.ndarray:
    """Returns the labels of all files in an index, int32 [N]; `names` are the names of its class folders."""
    label_of = {name: label for label, name in enumerate(class_names)}
    return np.array([label_of[name] for name in names], np.int32)[index['kind']]


def _list(folder: str, classes: Sequence[str]) -> index_cache.Index:
    """Lists all images below the class folders of a split."""
    now = time.time_ns()
    files, kinds = [], []
    folders = {'': _times(os.stat(folder))}
    ignored: collections.Counter[str] = collections.Counter()
    progress = Progress(f'listing {folder!r}', len(classes), 'classes')
    with progress, concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
        for kind, (images, below, others) in enumerate(pool.map(lambda name: _walk(folder, name), classes)):
            if not images:
                raise ValueError(f'class folder {os.path.join(folder, classes[kind])!r} holds no images '
                                 f'({", ".join(SUFFIXES)}; other files: {others.total()}): fill or remove it')
            files += images
            kinds += [kind] * len(images)
            folders |= below
            ignored += others
            progress.add(1)
    if ignored:
        logging.info('%r: %d files are not images and are skipped: %s', folder, ignored.total(),
                     ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in ignored.most_common(5)))
    folder_layout.warn_of_depth(folder, files)
    return {'name': np.array([os.fsencode(name) for name in files]), 'kind': np.array(kinds, np.int32),
            'class': np.array([os.fsencode(name) for name in classes]), 'listed': np.array(now),
            'folder': np.array([os.fsencode(name) for name in folders]),
            'times': np.array([*folders.values()], np.int64), 'suffixes': np.array(SUFFIXES)}


def _walk(root: str, name: str, above: tuple = ()) -> tuple[list[str], dict[str, tuple], collections.Counter]:
    """Lists a folder recursively.

    Returns:
      The paths of the images relative to `root`, the times of each folder (see `_times`), and the number of other files
      by suffix.
    """
    identity = folder_entries.identity(os.path.join(root, name))
    if identity in above:
        raise ValueError(f'{os.path.join(root, name)!r} is a link to a folder that it lies in: remove it')
    above += (identity,)
    images, folders, others = [], {name: _times(os.stat(os.path.join(root, name)))}, collections.Counter()
    for entry in folder_entries.entries(os.path.join(root, name)):
        inner = f'{name}/{entry.name}'
        if entry.is_dir():
            below = _walk(root, inner, above)
            images += below[0]
            folders |= below[1]
            others += below[2]
        elif folder_entries.is_image(entry.name) and folder_entries.is_readable(entry.path):
            images.append(inner)  # a broken link is reported when it is read
        else:
            others[os.path.splitext(entry.name)[1].lower()] += 1
    return images, folders, others


def _times(status: os.stat_result) -> tuple[int, int]:
    """Returns the modification time and the inode's change time. Programs can set the first, but not the second."""
    return status.st_mtime_ns, status.st_ctime_ns


def _is_current(folder: str, classes: Sequence[str], index: index_cache.Index) -> bool:
    """Returns True if a cached list is still valid for the folder."""
    if index['class'].tolist() != [*map(os.fsencode, classes)] or index['suffixes'].tolist() != [*SUFFIXES]:
        return False
    try:
        if not (_times_are_plausible(index) and index_cache.reports_changes(folder)):
            return False
        listed = [os.path.join(folder, os.fsdecode(name)) for name in index['folder']]
        statuses = [*map(os.stat, listed)]
        # Links and mounts may lead to other file systems.
        by_device = {status.st_dev: name for status, name in zip(statuses, listed)}
        return ([*map(_times, statuses)] == [*map(tuple, index['times'].tolist())]
                and all(map(index_cache.reports_changes, by_device.values())))
    except OSError:
        return False


def _times_are_plausible(index: index_cache.Index) -> bool:
    """Returns True if the listed times are plausible modification times.

    They are unreliable if all class folders have the same time, or if a folder changed just before it was listed.
    """
    changed = index['times'][:, 0]
    of_classes = [name != b'' and b'/' not in name for name in index['folder'].tolist()]
    return (len(np.unique(changed[of_classes])) > 1 and changed.min() > _EARLIEST
            and changed.max() <= index['listed'] - _SETTLED)


def _stratified_slice(index: index_cache.Index, start: int, stop: int) -> np.ndarray:
    """Returns the sorted positions of a class-stratified slice.

    The images are ordered so that each class is spread evenly over the order. The slice is [start, stop) of this order,
    so it has each class in proportion to its size.
    """
    names, kind = index['name'], index['kind']
    if stop - start == len(names):
        return np.arange(len(names))
    key = [hashlib.blake2b(name, digest_size=8).digest() for name in names.tolist()]
    by_class = np.lexsort((np.array(key), kind))
    sizes = np.bincount(kind)
    rank = np.arange(len(names)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    share = np.empty(len(names))
    share[by_class] = (rank + 0.5) / np.repeat(sizes, sizes)
    return np.sort(np.lexsort((kind, share))[start:stop])
