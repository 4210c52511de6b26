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

from evit_jax.data import index_cache, progress, splits
from evit_jax.data.fingerprint import digest

SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp')
_SCANS = 16               # classes listed at the same time
_SETTLED = 2_000_000_000  # ns; a folder that changed so shortly before it was listed may have changed once more


class FolderSource:
    """The images of a split, in the order of their names; ids are their paths below `path`.

    The list of files is kept, and used again while the modification time of every folder in it is the same: files and
    folders added, removed or renamed are noticed. A file written over is not, nor need it be: the list holds names.
    Noticed late, or not at all, are changes on file systems that do not keep these times.

    Attributes:
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
        have = _splits(self._path)
        self.class_names = _classes(os.path.join(self._path, 'train' if 'train' in have else have[0]))
        self.num_classes = len(self.class_names)
        self.split = splits.resolve(split, have)
        found = {name: self._index(name, cache) for name in splits.names(self.split, have)}
        self.parts = splits.parts(self.split, {name: len(index['name']) for name, index in found.items()})
        chosen = [(part.split, _slice(found[part.split], part.start, part.stop)) for part in self.parts]
        self._folders = [name for name, _ in chosen]
        self._ends = np.cumsum([len(positions) for _, positions in chosen])
        self._names = np.concatenate([found[name]['name'][positions] for name, positions in chosen])
        self.labels = np.concatenate([self._labels_of(found[name])[positions] for name, positions in chosen])

    def _index(self, split: str, cache: str | None) -> index_cache.Index:
        folder = os.path.join(self._path, split)
        classes = _classes(folder)
        unknown = sorted(set(classes) - set(self.class_names))
        if unknown:
            raise ValueError(f'{folder!r} has {_few(unknown, "class")} that train/ does not have: move or remove '
                             f'{"it" if len(unknown) == 1 else "them"}')
        return index_cache.load_or_build(
            f'folder_{split}', beside=self._path, cache=cache, build=lambda: _list(folder, classes),
            is_current=lambda index: _is_current(folder, index))

    def _labels_of(self, index: index_cache.Index) -> np.ndarray:
        place = {name: label for label, name in enumerate(self.class_names)}
        return np.array([place[os.fsdecode(name)] for name in index['class']], np.int32)[index['kind']]

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
        return {'image': image, 'label': int(self.labels[index]), 'id': _printable(name)}


def _splits(path: str) -> list[str]:
    """The folders of splits that there are."""
    if '://' in path:
        raise ValueError(f"{path!r}: source 'folder' reads mounted folders; mount the bucket, or use source 'tfds'")
    present = sorted(entry.name for entry in _entries(path))
    have = [name for name in ('train', *splits.HELD_OUT) if name in present]
    if not have:
        raise FileNotFoundError(f'{path!r} has no folder train/, but {_few(present, "entry", "entries")}: images are '
                                'expected as train/<class>/*.jpg, and as val/<class>/*.jpg to evaluate on')
    return have


def _entries(folder: str) -> list[os.DirEntry]:
    """What is not hidden, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith('.')), key=lambda entry: entry.name)
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no folder {folder!r}') from None
    except NotADirectoryError:
        raise NotADirectoryError(f'{folder!r} is a file, but a folder is expected there') from None


def _classes(folder: str) -> tuple[str, ...]:
    entries = _entries(folder)
    classes = tuple(entry.name for entry in entries if entry.is_dir())
    stray = [entry.name for entry in entries if entry.name.lower().endswith(SUFFIXES) and entry.name not in classes]
    if stray:
        raise ValueError(f'{folder!r} holds {_few(stray, "image")} outside of any class: move to {folder}/<class>/')
    if not classes:
        raise ValueError(f'{folder!r} holds no folders of classes: images are expected as {folder}/<class>/*.jpg')
    return classes


def _list(folder: str, classes: Sequence[str]) -> index_cache.Index:
    """Lists all images below a split's folder."""
    now = time.time_ns()
    said = progress.Progress(f'listing {folder!r}', len(classes), 'classes')
    files, kinds = [], []
    folders = {'': os.stat(folder).st_mtime_ns}
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
        logging.info('%s: %d files are no images and were left out: %s', folder, ignored.total(),
                     ', '.join(f'{count} {suffix or "without suffix"}' for suffix, count in ignored.most_common(5)))
    return {'name': np.array([os.fsencode(name) for name in files]), 'kind': np.array(kinds, np.int32),
            'class': np.array([os.fsencode(name) for name in classes]), 'listed': np.array(now),
            'folder': np.array([os.fsencode(name) for name in folders]),
            'changed': np.array([*folders.values()], np.int64)}


def _walk(root: str, name: str, above: tuple = ()) -> tuple[list[str], dict[str, int], collections.Counter]:
    """Images at and below a folder, the times at which the folders changed, and the suffixes of what is no image."""
    place = os.stat(os.path.join(root, name))
    if (place.st_dev, place.st_ino) in above:
        raise ValueError(f'{os.path.join(root, name)!r} is a link to a folder that it lies in: remove it')
    above += ((place.st_dev, place.st_ino),)
    images, folders, others = [], {name: place.st_mtime_ns}, collections.Counter()
    for entry in _entries(os.path.join(root, name)):
        inner = f'{name}/{entry.name}'
        if entry.is_dir():
            below = _walk(root, inner, above)
            images += below[0]
            folders |= below[1]
            others += below[2]
        elif entry.name.lower().endswith(SUFFIXES) and (entry.is_file() or entry.is_symlink()):
            images.append(inner)  # a link that leads nowhere, too: it is reported when it is read
        else:
            others[os.path.splitext(entry.name)[1].lower()] += 1
    return images, folders, others


def _is_current(folder: str, index: index_cache.Index) -> bool:
    if index['changed'].max() > index['listed'] - _SETTLED:
        return False
    try:
        return all(os.stat(os.path.join(folder, os.fsdecode(name))).st_mtime_ns == changed
                   for name, changed in zip(index['folder'], index['changed'].tolist()))
    except OSError:
        return False


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


def _few(names: Sequence[str], one: str, many: str = '') -> str:
    if not names:
        return f'no {many or one + "s"}'
    shown = ', '.join(map(_printable, names[:5])) + (', ...' if len(names) > 5 else '')
    plural = many or (one + 'es' if one.endswith('s') else one + 's')
    return f'{len(names)} {one if len(names) == 1 else plural} ({shown})'


def _printable(name: str) -> str:
    return os.fsencode(name).decode('utf-8', 'backslashreplace')
