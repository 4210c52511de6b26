"""Indexes of data that are slow to make: kept beside the data or in a cache folder, and used while they are current."""

import hashlib
import os
import pathlib
import tempfile
import time
import zipfile
from collections.abc import Callable

import numpy as np
from absl import logging

Index = dict[str, np.ndarray]

_MOUNTS = '/proc/self/mountinfo'  # Linux; elsewhere nothing is known of file systems
_IMAGES = ('squashfs', 'iso9660', 'erofs', 'cramfs', 'romfs')


def load_or_build(name: str, *, beside: str, cache: str | None, is_current: Callable[[Index], bool],
                  build: Callable[[], Index]) -> Index:
    """The index from where it was kept, if it is current; otherwise built, and kept where possible.

    Args:
      name: tells the indexes in one folder apart.
      beside: folder of the data; the index lies in it as a hidden file.
      cache: folder for what cannot be written beside the data; None: it is then built again every time.
      is_current: whether an index found (its keys are those that `build` gives) fits the data as they are now. One that
        does not fit as soon as it is built is not kept.
    """
    kept = files(name, beside, cache)
    for file in kept:
        index = _load(file)
        try:
            if index is not None and is_current(index):
                made = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(float(index['made'])))
                logging.info('the index %s of %r comes from %r, made %s; remove that file to have it made anew', name,
                             beside, str(file), made)
                return index
        except KeyError:  # of another version
            pass
    index = build()
    if not is_current(index):
        logging.info('the index %s of %r is not kept and will be made again: the data have just changed, or their '
                     'times do not tell changes', name, beside)
        return index
    for file in kept:
        try:
            _save(file, index | {'made': np.array(time.time())})
            return index
        except OSError as error:
            logging.info('the index %s cannot be kept in %s: %s', name, file.parent, error.strerror or error)
    logging.warning('the index %s of %s is kept nowhere and will be built again; give a cache folder that can be '
                    'written', name, beside)
    return index


def tells_changes(folder: str) -> bool:
    """True unless the file system is known to keep a folder's time when its entries change.

    FUSE mounts of buckets show the time of the mount or of the first look; disk images show what their maker wrote.
    """
    device = os.stat(folder).st_dev
    try:
        with open(_MOUNTS, encoding='utf-8', errors='replace') as mounts:
            mounted = [line.split() for line in mounts]
    except OSError:
        return True
    number = f'{os.major(device)}:{os.minor(device)}'
    kinds = [words[words.index('-') + 1] for words in mounted if words[2] == number and '-' in words]
    return not any(kind in _IMAGES or kind.split('.')[0] == 'fuse' for kind in kinds)


def files(name: str, beside: str, cache: str | None) -> list[pathlib.Path]:
    """The files that may hold an index; see `load_or_build`."""
    found = [] if '://' in beside else [pathlib.Path(beside, f'.evit_jax_{name}.npz')]
    if cache is not None:
        key = hashlib.sha256(os.path.abspath(beside).encode() if found else beside.encode()).hexdigest()[:16]
        found.append(pathlib.Path(cache).expanduser() / f'{name}_{key}.npz')
    return found


def _load(place: pathlib.Path) -> Index | None:
    try:
        with np.load(place, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # absent, cut off, or something else
        return None


def _save(place: pathlib.Path, index: Index) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, made = tempfile.mkstemp(prefix=place.name, dir=place.parent)
    try:
        with os.fdopen(handle, 'wb') as file:
            np.savez(file, **index)
        os.chmod(made, 0o644)  # for whoever else reads the data
        os.replace(made, place)
    except BaseException:
        os.unlink(made)
        raise
