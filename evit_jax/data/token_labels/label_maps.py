"""Dense label maps: the likeliest classes in each cell of a grid over the whole image, for each example.

A folder holds the maps of one split with N examples. Each of the `rows` x `columns` cells of a map has the `top`
likeliest classes, best first:

  label_maps.json  metadata (see `LabelMapsMetadata`), and the number of rows written so far
  keys.npy         uint64 [N]: hash of the example's id; 0 if it has no map, for example because it is unreadable
  values.npy       float16 [N, top, rows, columns]: logits
  indices.npy      uint8, uint16 or uint32 [N, top, rows, columns]: classes

The id of an example selects its map, so the maps also work for a slice of the split or another order. Readers map the
files into memory, so processes on one machine share the memory. The number of rows is updated atomically after the rows
have reached the disk. An interrupted writer continues with the next row. ImageNet at 18 x 18 cells takes 8.3 GB.

Classes that are not stored have a logit of 0 in the softmax. This project writes logits relative to the level of those
classes, which is the log of the mean of their exponentials. This preserves the annotator's probabilities. The published
maps store the raw logits of the annotator.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.data.fingerprint import digest, evenly_spaced
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source
from evit_jax.runtime import storage

_METADATA_FILE, _FORMAT = 'label_maps.json', 'evit_jax label maps, 2'
_FLUSH_SECONDS = 10.0  # seconds between flushes to disk
_NUM_SAMPLED = 16      # number of examples that are checked for a map before training
_MIN_FREE = 2**26      # bytes to leave free on the disk
_MAX_VALUE = 6e4       # largest stored logit; float16 can represent it


class LabelMap(NamedTuple):
    """The label map of one image."""

    value: np.ndarray  # float32 [top, rows, columns], logits
    index: np.ndarray  # int [top, rows, columns], classes


class Entry(NamedTuple):
    """A row to write."""

    example: str               # id of the example
    label_map: LabelMap | None  # None: the example has no map
    problem: str = ''          # reason why the example has no map


@dataclasses.dataclass(frozen=True)
class LabelMapsMetadata:
    """Describes the maps in a folder."""

    annotator: str               # unique description of the model that made the maps
    data: str                    # source, name and split
    class_names: tuple[str, ...]
    classes: int
    examples: int                # N
    top: int
    grid: tuple[int, int]        # rows and columns of a map

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and dtype of the array in each file."""
        shape = self.examples, self.top, *self.grid
        return {'keys': ((self.examples,), np.dtype(np.uint64)), 'values': (shape, np.dtype(np.float16)),
                'indices': (shape, np.min_scalar_type(self.classes - 1))}


class LabelMaps:
    """Mapping from the id of an example to its map in a folder. Worker processes open the files themselves.

    Attributes:
      folder: path of the folder.
      metadata: metadata of the maps.

    Raises:
      FileNotFoundError: the folder holds no maps.
      ValueError: the maps are unfinished or damaged.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = _local(folder)
        stored = _read_metadata(self.folder)
        if stored is None:
            raise FileNotFoundError(f'there are no label maps in {os.fspath(folder)!r}: make them with '
                                    'python -m evit_jax.label')
        self.metadata, done = stored
        if done < self.metadata.examples:
            raise ValueError(f'the label maps in {os.fspath(folder)!r} are of {done:,} of {self.metadata.examples:,} '
                             'examples so far: repeat the command that writes them; it continues there')
        keys, self._values, self._indices = _open(self.folder, self.metadata, 'r')
        self._order = np.argsort(keys, kind='stable')
        self._keys = keys[self._order]
        if duplicates := int(np.count_nonzero((self._keys[1:] == self._keys[:-1]) & (self._keys[1:] != 0))):
            raise ValueError(f'the label maps in {os.fspath(folder)!r} have {duplicates:,} duplicate ids, so a map may '
                             'be that of another example: give each example an id of its own and write the label maps '
                             'again')

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
        """Digest of the metadata, the ids of all examples, and 16 maps."""
        rows = evenly_spaced(self.metadata.examples, _NUM_SAMPLED)
        metadata = json.dumps(dataclasses.asdict(self.metadata))
        return digest(metadata, self._keys.tobytes(), self._values[rows].tobytes(), self._indices[rows].tobytes())

    def check(self, source: Source) -> None:
        """Raises a ValueError if the maps belong to another source. It checks the classes and 16 examples."""
        metadata, maps = self.metadata, f'the label maps in {os.fspath(self.folder)!r}'
        if metadata.classes != source.num_classes:
            raise ValueError(f'{maps} are of {metadata.classes} classes, the data have {source.num_classes}: make '
                             'maps of these data with python -m evit_jax.label')
        theirs, ours = metadata.class_names, tuple(source.class_names)
        if theirs and ours and theirs != ours:
            first = next(label for label in range(metadata.classes) if theirs[label] != ours[label])
            raise ValueError(f'{maps} are of other classes than the data: {theirs[first]!r} is class {first} there, '
                             f'and {ours[first]!r} in the data')
        for index in evenly_spaced(len(source), _NUM_SAMPLED):
            try:
                example = source[index]['id']
            except (ValueError, OSError):
                continue  # unreadable; training uses a replacement
            if example not in self:
                raise ValueError(f'{maps} hold none of example {example!r}: they are of {metadata.data}; make maps of '
                                 'these data with python -m evit_jax.label')

    def _row(self, example):
        key = _key(example)
        position = np.searchsorted(self._keys, key)
        return self._order[position] if position < len(self._keys) and self._keys[position] == key else None


def write(folder: str | os.PathLike, metadata: LabelMapsMetadata, make: Callable[[int], Iterator[Entry]]) -> int:
    """Writes the maps of all examples. If an earlier call was interrupted, writes the remaining maps.

    An error or interrupt keeps the maps written so far; the next call continues with the next row.

    Args:
      folder: folder of the maps; created if absent.
      metadata: metadata of the maps.
      make: takes a row, and returns an iterator over the entries of this and all later rows.

    Returns:
      The number of examples without a map that this call has processed.

    Raises:
      ValueError: the folder holds other maps, the disk is full, or no example has a map.
    """
    folder = _local(folder)
    done = _create(folder, metadata)
    if done == metadata.examples:
        logging.info('%s: all %s label maps exist', folder, f'{done:,}')
        return 0
    keys, values, indices = files = _open(folder, metadata, 'r+')
    progress, missing, flushed = Progress('label maps', metadata.examples, 'images', done), 0, time.monotonic()
    try:
        for entry in make(done):
            problem = _problem(entry)
            if problem:
                missing += 1
                logging.warning('no label map of %s: %s', entry.example, problem)
            else:
                values[done] = np.clip(entry.label_map.value, -_MAX_VALUE, _MAX_VALUE)
                indices[done], keys[done] = entry.label_map.index, _key(entry.example)
            done += 1
            progress.add(1)
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                _flush(folder, metadata, files, done)
                flushed = time.monotonic()
    finally:
        progress.close()
        _flush(folder, metadata, files, done)
    assert done == metadata.examples, f'{done} of {metadata.examples} entries were made'
    if missing == metadata.examples:
        raise ValueError(f'none of the {missing:,} examples has a label map; reason of the last one: {problem}')
    return missing


def _problem(entry: Entry) -> str:
    if entry.label_map is None:
        return entry.problem or 'no reason is given'
    return '' if np.isfinite(entry.label_map.value).all() else 'its values are not finite (NaN or infinity)'


def check_folder(folder: str | os.PathLike, metadata: LabelMapsMetadata) -> None:
    """Raises a ValueError if the folder holds maps with other metadata. The folder may be absent."""
    stored = _read_metadata(_local(folder))
    if stored is None:
        return
    for field in dataclasses.fields(LabelMapsMetadata):
        present, requested = getattr(stored[0], field.name), getattr(metadata, field.name)
        if present != requested:
            raise ValueError(f'{os.fspath(folder)!r} holds label maps with {field.name} {_short(present)}, and not '
                             f'{_short(requested)}: name another folder, or remove it')


def _local(folder):
    if '://' in os.fspath(folder):
        raise ValueError(f'{os.fspath(folder)!r}: label maps can be stored in mounted folders only')
    return pathlib.Path(folder).expanduser()


def _short(value):
    text = repr(value)
    return text if len(text) < 200 else f'{text[:200]}...'


def _create(folder, metadata):
    """Creates the files if absent, and returns the number of rows written so far."""
    check_folder(folder, metadata)
    stored = _read_metadata(folder)
    if stored is not None:
        return stored[1]
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in metadata.arrays.values())
    if size + _MIN_FREE > (free := shutil.disk_usage(folder).free):
        raise ValueError(f'{os.fspath(folder)!r} has {free / 1e9:.1f} GB of free space, the label maps need '
                         f'{size / 1e9:.1f} GB: name a folder on a larger disk')
    _open(folder, metadata, 'w+')
    _write_metadata(folder, metadata, 0)
    return 0


def _open(folder, metadata, mode):
    files = []
    for name, (shape, dtype) in metadata.arrays.items():
        path = folder / f'{name}.npy'
        try:
            file = np.lib.format.open_memmap(path, mode, dtype, shape)
        except (OSError, ValueError) as error:
            raise ValueError(f'{os.fspath(path)!r} cannot be opened ({error}): write the label maps again') from error
        if file.shape != shape or file.dtype != dtype:
            raise ValueError(f'{os.fspath(path)!r} holds {file.dtype} {list(file.shape)}, and not {dtype} '
                             f'{list(shape)} as in {_METADATA_FILE}: write the label maps again')
        files.append(file)
    return files


def _flush(folder, metadata, files, done):
    for file in files:
        file.flush()
    _write_metadata(folder, metadata, done)


def _write_metadata(folder: pathlib.Path, metadata: LabelMapsMetadata, done: int) -> None:
    content = {'format': _FORMAT, **dataclasses.asdict(metadata), 'done': done}
    storage.write_atomic(folder / _METADATA_FILE, json.dumps(content, indent=1).encode())


def _read_metadata(folder: pathlib.Path) -> tuple[LabelMapsMetadata, int] | None:
    """Reads the metadata and the number of rows written so far; None if the folder holds no maps."""
    path = folder / _METADATA_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding='utf-8'))
        if content.pop('format') != _FORMAT:
            raise ValueError('another format')
        done, names, grid = content.pop('done'), tuple(content.pop('class_names')), tuple(content.pop('grid'))
        return LabelMapsMetadata(class_names=names, grid=grid, **content), int(done)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f'{os.fspath(path)!r} is not a file of evit_jax.label ({error})') from error


def _key(example: str) -> np.uint64:
    """Returns a hash that is never 0. The collision probability among 1.3 million ids is about 1 in 20 million."""
    digest = hashlib.blake2b(example.encode('utf-8', 'backslashreplace'), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, 'little') or 1)
