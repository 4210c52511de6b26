"""Indexes of data that are slow to make: kept beside the data or in a cache folder, and used while they are true."""

import hashlib
import os
import pathlib
import tempfile
import zipfile
from collections.abc import Callable

import numpy as np
from absl import logging

Index = dict[str, np.ndarray]


def load_or_build(name: str, *, beside: str, cache: str | None, is_current: Callable[[Index], bool],
                  build: Callable[[], Index]) -> Index:
    """The index from where it was kept, if that is still true; otherwise built, and kept where possible.

    Args:
      name: tells the indexes in one folder apart.
      beside: folder of the data; the index lies in it as a hidden file.
      cache: folder for what cannot be written beside the data; None: it is then built again every time.
      is_current: whether an index found (its keys are those that `build` gives) fits the data as they are now.
    """
    places = [] if '://' in beside else [pathlib.Path(beside, f'.evit_jax_{name}.npz')]
    if cache is not None:
        key = hashlib.sha256(os.path.abspath(beside).encode() if places else beside.encode()).hexdigest()[:16]
        places.append(pathlib.Path(cache).expanduser() / f'{name}_{key}.npz')
    for place in places:
        index = _load(place)
        try:
            if index is not None and is_current(index):
                return index
        except KeyError:  # of another version
            pass
    index = build()
    for place in places:
        try:
            _save(place, index)
            return index
        except OSError as error:
            logging.info('the index %s cannot be kept in %s: %s', name, place.parent, error.strerror or error)
    logging.warning('the index %s of %s is kept nowhere and will be built again; give a cache folder that can be '
                    'written', name, beside)
    return index


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
