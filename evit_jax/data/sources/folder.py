"""One's own images: `path/train/<class>/*.jpg`, and `path/val/<class>/*.jpg` (or validation/, or test/) to evaluate on.

Folders below a class belong to it, links are followed, hidden files are left out. Without a folder to evaluate on, the
images of train/ are split, each class for itself, by a hash of their names: an image added later moves few others.
"""

import collections
import concurrent.futures
import hashlib
import os
import time
from collections.abc import Sequence

import numpy as np
from absl import logging

from evit_jax.data import progress, splits
from evit_jax.data.classes import display_name
from evit_jax.data.fingerprint import digest
from evit_jax.data.names import in_one_line
from evit_jax.data.sources import folder_entries, folder_layout, index_cache
from evit_jax.data.transforms.decode import SUFFIXES

_SCANS = 16               # classes listed at the same time
_SETTLED = 2_000_000_000  # ns; a folder that changed so shortly before it was listed may have changed once more
_EARLIEST = 347_155_200_000_000_000  # ns, 1981: earlier times (0, FAT's 1980-01-01) are no time of a change


class FolderSource:
    """The images of a split, in the order of their names; ids are their paths below `path`, in one line.

    An example also has `path`, the same path as the file system has it.

    The list of files is kept, and used again while the classes and the times of every folder in it are the same: files
    and folders added, removed or renamed are noticed. A file written over is not, nor need it be: the list holds names.
    Where the times do not tell changes (on disk images and FUSE mounts, or where all class folders have one time, or a
    time before 1981 or in the future), nothing is kept and the files are listed at each start.

    Attributes:
      class_names: names of the folders as `classes.displayed`, sorted.
      labels: int32 [N], of all examples, without reading them.
      split: the split with 'train' and 'auto' resolved.

    Args:
      split: 'train' or 'auto' (see `splits.resolve`), or a split or slice as tfds writes it, by the folders' names.
      cache: folder for the list of files where it cannot be kept in `path`.

    Raises:
      OSError: a folder is missing or cannot be read; on reading an example, the same of its file.
      ValueError: the folders are not laid out as expected; says how.
    """
    image_size = None

    def __init__(self, path: str | os.PathLike, split: str, cache: str | None = None):
        self._path = os.path.expanduser(path)
        have = folder_layout.split_folders(self._path)
        self.class_names = folder_layout.class_names(self._path, have)
        self.num_classes = len(self.class_names)
        self.split = splits.resolve(split, folder_layout.labelled(self._path, have))
        folder_layout.check_split(self._path, self.split, have)
        found = {name: self._index(name, cache) for name in splits.names(self.split, have)}
        try:
            self.parts = splits.parts(self.split, {name: len(index['name']) for name, index in found.items()})
        except ValueError as error:
            if self.split == split:
                raise
            raise ValueError(f'{self._path!r} has no val/, so a tenth of train/ is held out to evaluate on: {error}; '
                             'make val/<class>/, or add images') from error
        chosen = [(part.split, _slice(found[part.split], part.start, part.stop)) for part in self.parts]
        self._folders = [name for name, _ in chosen]
        self._ends = np.cumsum([len(positions) for _, positions in chosen])
        self._names = np.concatenate([found[name]['name'][positions] for name, positions in chosen])
        self.labels = np.concatenate([self._labels_of(found[name])[positions] for name, positions in chosen])
        folder_layout.check_labels(self._path, split, self.split, self.class_names, self.labels)

    def _index(self, split: str, cache: str | None) -> index_cache.Index:
        folder = os.path.join(self._path, split)
        classes = folder_layout.class_folders(folder)
        folder_layout.check_known(folder, classes, self.class_names)
        return index_cache.load_or_build(
            f'folder_{split}', beside=self._path, cache=cache, build=lambda: _list(folder, classes),
            is_current=lambda index: _is_current(folder, classes, index))

    def _labels_of(self, index: index_cache.Index) -> np.ndarray:
        place = {name: label for label, name in enumerate(self.class_names)}
        return np.array([place[display_name(os.fsdecode(name))] for name in index['class']], np.int32)[index['kind']]

    @property
    def fingerprint(self) -> str:
        """A digest of the files' names in their order; a file written over keeps it."""
        parts = zip(self._folders, np.split(self._names, self._ends[:-1]))
        return digest(*(text for folder, names in parts for text in (folder, b'\0'.join(names.tolist()))))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f'example {index} of {len(self)}')
        folder = self._folders[np.searchsorted(self._ends, index, 'right')]
        name = os.path.join(folder, os.fsdecode(self._names[index]))
        with open(os.path.join(self._path, name), 'rb') as file:
            image = file.read()
        return {'image': image, 'label': int(self.labels[index]), 'id': in_one_line(name), 'path': name}


def _list(folder: str, classes: Sequence[str]) -> index_cache.Index:
    """Lists all images below a split's folder."""
    now = time.time_ns()
    said = progress.Progress(f'listing {folder!r}', len(classes), 'classes')
    files, kinds = [], []
    folders = {'': _times(os.stat(folder))}
    ignored: collections.Counter[str] = collections.Counter()
    with concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
        for kind, (mine, below, others) in enumerate(pool.map(lambda name: _walk(folder, name), classes)):
            if not mine:
                raise ValueError(f'class folder {os.path.join(folder, classes[kind])!r} holds no images '
                                 f'({", ".join(SUFFIXES)}; other files: {others.total()}): fill or remove it')
            files += mine
            kinds += [kind] * len(mine)
            folders |= below
            ignored += others
            said.add(1)
    if ignored:
        logging.info('%r: %d files are no images and were left out: %s', folder, ignored.total(),
                     ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in ignored.most_common(5)))
    folder_layout.warn_of_depth(folder, files)
    return {'name': np.array([os.fsencode(name) for name in files]), 'kind': np.array(kinds, np.int32),
            'class': np.array([os.fsencode(name) for name in classes]), 'listed': np.array(now),
            'folder': np.array([os.fsencode(name) for name in folders]),
            'times': np.array([*folders.values()], np.int64), 'suffixes': np.array(SUFFIXES)}


def _walk(root: str, name: str, above: tuple = ()) -> tuple[list[str], dict[str, tuple], collections.Counter]:
    """Images at and below a folder, the times at which the folders changed, and the suffixes of what is no image."""
    here = folder_entries.identity(os.path.join(root, name))
    if here in above:
        raise ValueError(f'{os.path.join(root, name)!r} is a link to a folder that it lies in: remove it')
    above += (here,)
    images, folders, others = [], {name: _times(os.stat(os.path.join(root, name)))}, collections.Counter()
    for entry in folder_entries.entries(os.path.join(root, name)):
        inner = f'{name}/{entry.name}'
        if entry.is_dir():
            below = _walk(root, inner, above)
            images += below[0]
            folders |= below[1]
            others += below[2]
        elif folder_entries.is_image(entry.name) and folder_entries.is_readable(entry.path):
            images.append(inner)  # a link that leads nowhere, too: it is reported when it is read
        else:
            others[os.path.splitext(entry.name)[1].lower()] += 1
    return images, folders, others


def _times(status: os.stat_result) -> tuple[int, int]:
    """Times of a folder's last change: of its entries, which programs can set, and of its inode, which none can."""
    return status.st_mtime_ns, status.st_ctime_ns


def _is_current(folder: str, classes: Sequence[str], index: index_cache.Index) -> bool:
    if index['class'].tolist() != [*map(os.fsencode, classes)] or index['suffixes'].tolist() != [*SUFFIXES]:
        return False
    try:
        if not (_has_times_of_changes(index) and index_cache.tells_changes(folder)):
            return False
        listed = [os.path.join(folder, os.fsdecode(name)) for name in index['folder']]
        statuses = [*map(os.stat, listed)]
        by_device = {status.st_dev: name for status, name in zip(statuses, listed)}  # links and mounts lead elsewhere
        return ([*map(_times, statuses)] == [*map(tuple, index['times'].tolist())]
                and all(map(index_cache.tells_changes, by_device.values())))
    except OSError:
        return False


def _has_times_of_changes(index: index_cache.Index) -> bool:
    """True if the times of the folders can be those of their last changes: not all class folders have one time, and no
    folder has changed shortly before the files were listed.
    """
    changed = index['times'][:, 0]
    of_classes = [name != b'' and b'/' not in name for name in index['folder'].tolist()]
    return (len(np.unique(changed[of_classes])) > 1 and changed.min() > _EARLIEST
            and changed.max() <= index['listed'] - _SETTLED)


def _slice(index: index_cache.Index, start: int, stop: int) -> np.ndarray:
    """Positions of the images `start` to `stop` of an order in which every stretch has each class in proportion."""
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
