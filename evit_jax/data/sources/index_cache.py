"""Caches indexes that are slow to build, in the folder of the data or in a cache folder."""

import hashlib
import os
import pathlib
import time
import zipfile
from collections.abc import Callable

import numpy as np
from absl import logging

from evit_jax.runtime import storage

Index = dict[str, np.ndarray]

_MOUNTS = '/proc/self/mountinfo'  # exists on Linux only; elsewhere, every file system is trusted
_DISK_IMAGES = ('squashfs', 'iso9660', 'erofs', 'cramfs', 'romfs')


def load_or_build(name: str, *, data_folder: str, cache: str | None, is_current: Callable[[Index], bool],
                  build: Callable[[], Index]) -> Index:
    """Returns the stored index if it is current; otherwise builds it and stores it if possible.

    Args:
      name: name of the index, unique within a folder.
      data_folder: folder of the data; the index is stored in it as a hidden file.
      cache: folder to use if `data_folder` is not writable. If None, the index is then built at every call.
      is_current: returns True if an index matches the current data. It gets an index as returned by `build`. An index
        that does not match right after it was built is not stored.
      build: returns a new index.
    """
    paths = index_files(name, data_folder, cache)
    for path in paths:
        index = _load(path)
        try:
            if index is not None and is_current(index):
                made = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(float(index['made'])))
                logging.info('index %s of %r: read from %r, built %s; remove that file to build it again', name,
                             data_folder, str(path), made)
                return index
        except KeyError:  # written by another version
            pass
    index = build()
    if not is_current(index):
        logging.info('index %s of %r: not stored and built again next time, because the data have just changed or the '
                     'times of their folders do not report changes', name, data_folder)
        return index
    for path in paths:
        try:
            _save(path, index | {'made': np.array(time.time())})
            return index
        except OSError as error:
            logging.info('index %s: cannot be stored in %s: %s', name, path.parent, error.strerror or error)
    logging.warning('index %s of %s: cannot be stored and will be built again; set data.index_cache to a folder that '
                    'can be written', name, data_folder)
    return index


def reports_changes(folder: str) -> bool:
    """Returns False if the file system is known not to update a folder's time when its entries change.

    FUSE mounts of buckets report the time of the mount or of the first access. Disk images report constant times.
    """
    device = os.stat(folder).st_dev
    try:
        with open(_MOUNTS, encoding='utf-8', errors='replace') as mounts:
            mounted = [line.split() for line in mounts]
    except OSError:
        return True
    number = f'{os.major(device)}:{os.minor(device)}'
    kinds = [words[words.index('-') + 1] for words in mounted if words[2] == number and '-' in words]
    return not any(kind in _DISK_IMAGES or kind.split('.')[0] == 'fuse' for kind in kinds)


def index_files(name: str, data_folder: str, cache: str | None) -> list[pathlib.Path]:
    """Returns the paths at which an index may be stored; see `load_or_build`."""
    paths = [] if '://' in data_folder else [pathlib.Path(data_folder, f'.evit_jax_{name}.npz')]
    if cache is not None:
        key = hashlib.sha256(os.path.abspath(data_folder).encode() if paths else data_folder.encode()).hexdigest()[:16]
        paths.append(pathlib.Path(cache).expanduser() / f'{name}_{key}.npz')
    return paths


def _load(path: pathlib.Path) -> Index | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # the file is absent, truncated or of another kind
        return None


def _save(path: pathlib.Path, index: Index) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.open_atomic(path) as file:
        np.savez(file, **index)
