"""Dense label maps: of each example, which classes are likely at each place of a square grid over the whole image.

A folder holds the maps of one split, as its source numbers the examples (N), each with the `top` likeliest classes at
each of `side` x `side` places, best first:

  label_maps.json  what they are of and from (see `About`), and how many rows are done
  keys.npy         uint64 [N]: a hash of the example's id; 0 where there is no map, as of an image that cannot be read
  values.npy       float16 [N, top, side, side]: logits
  indices.npy      uint8, uint16 or uint32 [N, top, side, side]: classes

Maps are found by the example's id alone, so that a slice of the split, or another order of it, reads them too. Readers
map the files into memory: processes on one machine share them. The count of rows is written, whole, after the rows have
reached the disk, and an interrupted writer goes on behind them. ImageNet at 18 x 18 takes 8.3 GB.

The logits of the classes that are left out count as 0 in a softmax. The maps that this project makes are counted from
the level of those (the log of the mean of their exponentials), which keeps the annotator's probabilities; the published
maps hold its bare logits.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.data.fingerprint import digest
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source

_ABOUT, _FORMAT = 'label_maps.json', 'evit_jax label maps, 1'
_SECONDS = 10.0   # between two times that what is done is secured
_LOOKED_FOR = 16  # examples whose maps must be there before a training begins
_SPARE = 2**26    # bytes that stay free
_LARGEST = 6e4    # of float16


class LabelMap(NamedTuple):
    """What one image shows where."""

    value: np.ndarray  # [top, side, side] float32
    index: np.ndarray  # [top, side, side] classes


class Entry(NamedTuple):
    """A row to be written."""

    example: str               # its id
    made: LabelMap | None      # None: there is none
    problem: str = ''          # why not


@dataclasses.dataclass(frozen=True)
class About:
    """What the maps in a folder are."""

    annotator: str               # in words that no other annotator has
    data: str                    # source, name and split
    class_names: tuple[str, ...]
    classes: int
    examples: int                # N
    top: int
    side: int

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of each file's array."""
        shape = self.examples, self.top, self.side, self.side
        return {'keys': ((self.examples,), np.dtype(np.uint64)), 'values': (shape, np.dtype(np.float16)),
                'indices': (shape, np.min_scalar_type(self.classes - 1))}


class LabelMaps:
    """The finished maps in a folder, by the ids of their examples. Pickled to worker processes, which open it anew.

    Attributes:
      folder: where they are.
      about: what they are.

    Raises:
      FileNotFoundError: the folder holds no maps.
      ValueError: they are not finished, or damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = _local(folder)
        found = _read_about(self.folder)
        if found is None:
            raise FileNotFoundError(f'there are no label maps in {os.fspath(folder)!r}: make them with '
                                    'python -m evit_jax.label')
        self.metadata, done = found
        if done < self.metadata.examples:
            raise ValueError(f'the label maps in {os.fspath(folder)!r} are of {done:,} of {self.metadata.examples:,} '
                             'examples so far: give the command that makes them once more, it goes on there')
        keys, self._values, self._indices = _open(self.folder, self.metadata, 'r')
        self._order = np.argsort(keys, kind='stable')
        self._keys = keys[self._order]
        if twice := int(np.count_nonzero((self._keys[1:] == self._keys[:-1]) & (self._keys[1:] != 0))):
            raise ValueError(f'the label maps in {os.fspath(folder)!r} have {twice:,} ids twice, so a map may be that '
                             'of another example: give each example an id of its own and make the maps anew')

    def __getitem__(self, example: str) -> LabelMap:
        row = self._row(example)
        if row is None:
            raise ValueError(f'{os.fspath(self.folder)!r} holds no label map of example {example!r}')
        return LabelMap(self._values[row].astype(np.float32), np.asarray(self._indices[row]))

    def __contains__(self, example: str) -> bool:
        return self._row(example) is not None

    def __reduce__(self):
        return LabelMaps, (self.folder,)

    @property
    def fingerprint(self) -> str:
        """A digest of their origin, of the ids of all examples, and of the maps of some."""
        rows = np.unique(np.linspace(0, self.metadata.examples - 1, _LOOKED_FOR).astype(int))
        metadata = json.dumps(dataclasses.asdict(self.metadata))
        return digest(metadata, self._keys.tobytes(), self._values[rows].tobytes(), self._indices[rows].tobytes())

    def check(self, source: Source) -> None:
        """Raises a ValueError where these are not the maps of the source; some of its examples are looked for."""
        metadata, where = self.metadata, f'the label maps in {os.fspath(self.folder)!r}'
        if metadata.classes != source.num_classes:
            raise ValueError(f'{where} are of {metadata.classes} classes, the data have {source.num_classes}: make '
                             'maps of these data with python -m evit_jax.label')
        theirs, ours = metadata.class_names, tuple(source.class_names)
        if theirs and ours and theirs != ours:
            first = next(label for label in range(metadata.classes) if theirs[label] != ours[label])
            raise ValueError(f'{where} are of other classes than the data: {theirs[first]!r} is class {first} there, '
                             f'and {ours[first]!r} in the data')
        for index in np.unique(np.linspace(0, len(source) - 1, _LOOKED_FOR).astype(int)).tolist():
            try:
                example = source[index]['id']
            except (ValueError, OSError):
                continue  # training finds another in its place
            if example not in self:
                raise ValueError(f'{where} hold none of example {example!r}: they are of {metadata.data}; make maps of '
                                 'these data with python -m evit_jax.label')

    def _row(self, example):
        key = _key(example)
        place = np.searchsorted(self._keys, key)
        return self._order[place] if place < len(self._keys) and self._keys[place] == key else None


def write(folder: str | os.PathLike, metadata: About, make: Callable[[int], Iterator[Entry]]) -> int:
    """Writes the maps of all examples, or those that are missing where this was begun before.

    However it is left, by an error or an interrupt, what was made is kept and the next call goes on from there.

    Args:
      make: the entries from a row on, in order.

    Returns:
      Rows without a map, of those written by this call.

    Raises:
      ValueError: the folder holds maps of or from something else, there is no room, or none of the maps can be made.
    """
    folder = _local(folder)
    done = _begin(folder, metadata)
    if done == metadata.examples:
        logging.info('%s: all %s label maps are there', folder, f'{done:,}')
        return 0
    files, said, missing = _open(folder, metadata, 'r+'), Progress('label maps', metadata.examples, 'images', done), 0
    keys, values, indices = files
    secured = time.monotonic()
    try:
        for entry in make(done):
            problem = _problem(entry)
            if problem:
                missing += 1
                logging.warning('no label map of %s: %s', entry.example, problem)
            else:
                values[done] = np.clip(entry.made.value, -_LARGEST, _LARGEST)
                indices[done], keys[done] = entry.made.index, _key(entry.example)
            done += 1
            said.add(1)
            if time.monotonic() - secured > _SECONDS:
                _secure(folder, metadata, files, done)
                secured = time.monotonic()
    finally:
        _secure(folder, metadata, files, done)
    assert done == metadata.examples, f'{done} of {metadata.examples} entries were made'
    if missing == metadata.examples:
        raise ValueError(f'none of the {missing:,} examples has a label map, the last one as: {problem}')
    return missing


def _problem(entry: Entry) -> str:
    if entry.made is None:
        return entry.problem or 'no reason is given'
    return '' if np.isfinite(entry.made.value).all() else 'its values are not finite (NaN or infinity)'


def check_begun(folder: str | os.PathLike, metadata: About) -> None:
    """Raises a ValueError if the folder holds maps of or from something else; a missing folder does not."""
    found = _read_about(_local(folder))
    if found is None:
        return
    for field in dataclasses.fields(About):
        there, asked = (getattr(which, field.name) for which in (found[0], metadata))
        if there != asked:
            raise ValueError(f'{os.fspath(folder)!r} holds label maps with {field.name} {_short(there)}, and not '
                             f'{_short(asked)}: name another folder, or remove it')


def _local(folder):
    if '://' in os.fspath(folder):
        raise ValueError(f'{os.fspath(folder)!r}: label maps are kept in mounted folders only')
    return pathlib.Path(folder).expanduser()


def _short(value):
    text = repr(value)
    return text if len(text) < 200 else f'{text[:200]}...'


def _begin(folder, metadata):
    """Rows that are done; makes the files where there are none."""
    check_begun(folder, metadata)
    found = _read_about(folder)
    if found is not None:
        return found[1]
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in metadata.arrays.values())
    if size + _SPARE > (free := shutil.disk_usage(folder).free):
        raise ValueError(f'{os.fspath(folder)!r} has {free / 1e9:.1f} GB of room, the label maps need '
                         f'{size / 1e9:.1f} GB: name a folder on a larger disk')
    _open(folder, metadata, 'w+')
    _write_about(folder, metadata, 0)
    return 0


def _open(folder, metadata, mode):
    files = []
    for name, (shape, dtype) in metadata.arrays.items():
        path = folder / f'{name}.npy'
        try:
            file = np.lib.format.open_memmap(path, mode, dtype, shape)
        except (OSError, ValueError) as error:
            raise ValueError(f'{os.fspath(path)!r} cannot be opened ({error}): make the label maps anew') from error
        if file.shape != shape or file.dtype != dtype:
            raise ValueError(f'{os.fspath(path)!r} holds {file.dtype} {list(file.shape)}, and not {dtype} '
                             f'{list(shape)} as {_ABOUT} says: make the label maps anew')
        files.append(file)
    return files


def _secure(folder, metadata, files, done):
    for file in files:
        file.flush()
    _write_about(folder, metadata, done)


def _write_about(folder: pathlib.Path, metadata: About, done: int) -> None:
    told = {'format': _FORMAT, **dataclasses.asdict(metadata), 'done': done}
    handle, made = tempfile.mkstemp(prefix=f'.{_ABOUT}', dir=folder)
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            json.dump(told, file, indent=1)
            file.flush()
            os.fsync(handle)
        os.chmod(made, 0o644)
        os.replace(made, folder / _ABOUT)
    except BaseException:
        os.unlink(made)
        raise


def _read_about(folder: pathlib.Path) -> tuple[About, int] | None:
    """What the maps in the folder are, and how many are done; None where there are none."""
    path = folder / _ABOUT
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
        if told.pop('format') != _FORMAT:
            raise ValueError('another format')
        done, names = told.pop('done'), tuple(told.pop('class_names'))
        return About(class_names=names, **told), int(done)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{os.fspath(path)!r} is not what evit_jax.label writes ({error})') from error


def _key(example: str) -> np.uint64:
    """Never 0. Of 1.3 million ids two have the same key with a probability of 1 in 20 million."""
    digest = hashlib.blake2b(example.encode('utf-8', 'backslashreplace'), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, 'little') or 1)
