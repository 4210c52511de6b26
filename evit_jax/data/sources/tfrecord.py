"""Random access to TFRecord files, without TensorFlow: an index of where each record starts, and reads at offsets.

A record is its length (8 bytes, little-endian), a checksum of that (4), the data, and a checksum of the data (4).
Source: tensorflow.org/tutorials/load_data/tfrecord; the checksums are masked CRC-32C.
"""

import concurrent.futures
import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from evit_jax.data import progress
from evit_jax.data.sources import crc32c, index_cache

_HEAD, _TAIL = 12, 4  # bytes around the data
_SCANS = 16           # files looked at at the same time: the disk is waited for, not the processor


class LocalFile:
    """Reads at offsets, from any number of threads."""

    def __init__(self, path: str):
        self._file = open(path, 'rb', buffering=0)  # noqa: SIM115 (closed with the object, or by the interpreter)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, offset)

    def close(self) -> None:
        self._file.close()


class RemoteFile:
    """The same for what `epath` can open, such as gs://; one read at a time."""

    def __init__(self, path: str):
        self._file = epath.Path(path).open('rb')
        self._lock = threading.Lock()
        self._file.seek(0, os.SEEK_END)
        self.size = self._file.tell()

    def read(self, offset: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            return self._file.read(count)

    def close(self) -> None:
        self._file.close()


def open_file(path: str) -> LocalFile | RemoteFile:
    """Opens a file for reads at offsets."""
    return RemoteFile(path) if '://' in path else LocalFile(path)


class TFRecords:
    """The records of a split, as bytes, numbered through all its files. Opens each file once a process, when needed."""

    def __init__(self, files: Sequence[str], index: index_cache.Index, index_files: Sequence[str | os.PathLike] = ()):
        self._files, self._index_files = tuple(files), tuple(map(str, index_files))
        self._ends, self._offset, self._length = np.cumsum(index['count']), index['offset'], index['length']
        self._forget_files()

    def _forget_files(self):
        self._opened: dict[int, LocalFile | RemoteFile] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._offset)

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(f'record {number} of {len(self)}')
        file = int(np.searchsorted(self._ends, number, 'right'))
        offset, length = int(self._offset[number]), int(self._length[number])
        record = self._open(file).read(offset, _HEAD + length + _TAIL)
        if len(record) != _HEAD + length + _TAIL or int.from_bytes(record[:8], 'little') != length:
            remove = f'remove the index ({" or ".join(self._index_files)}) and ' if self._index_files else ''
            raise ValueError(f'{self._files[file]!r} has changed since it was indexed: there is no record of {length} '
                             f'bytes at byte {offset} any more; {remove}start again')
        return record[_HEAD:-_TAIL]

    def _open(self, file: int) -> LocalFile | RemoteFile:
        with self._lock:
            if file not in self._opened:
                self._opened[file] = open_file(self._files[file])
            return self._opened[file]

    def __getstate__(self):
        return self.__dict__ | {'_opened': None, '_lock': None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._forget_files()


def open_records(files: Sequence[str], counts: Sequence[int], *, name: str, cache: str | None = None) -> TFRecords:
    """Opens the files of one split.

    Args:
      files: all in one folder, in order; an index of them is kept there, or in `cache`.
      counts: records that each file is to hold.
      name: of the split, for the index and the log.
      cache: see `index_cache.load_or_build`.

    Raises:
      ValueError: a file is cut off, damaged, or holds another number of records.
    """
    names = np.array([os.path.basename(file) for file in files], np.bytes_)
    with concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
        sizes = np.array([*pool.map(lambda file: epath.Path(file).stat().length, files)], np.int64)

    def is_current(index):
        return all(np.array_equal(index[key], now) for key, now in
                   {'name': names, 'size': sizes, 'count': counts}.items())

    def build():
        said = progress.Progress(f'indexing {name!r}', sizes.sum() / 1e9, 'GB')
        found = []
        with concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
            scans = [pool.submit(scan, file, count) for file, count in zip(files, counts)]
            try:
                for size, done in zip(sizes, scans):
                    found.append(done.result())
                    said.add(size / 1e9)
            finally:
                pool.shutdown(cancel_futures=True)
        offset, length = (np.concatenate(arrays) for arrays in zip(*found))
        return {'name': names, 'size': sizes, 'count': np.array(counts), 'offset': offset, 'length': length}

    place = {'name': f'tfrecord_{name}', 'beside': os.path.dirname(files[0]), 'cache': cache}
    index = index_cache.load_or_build(**place, is_current=is_current, build=build)
    return TFRecords(files, index, index_cache.files(**place))


def scan(path: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where the records of a file start and how long their data are, int64 [N] each, from their lengths alone.

    Args:
      count: records that the file is to hold, if known.

    Raises:
      ValueError: the file is cut off, a length has a wrong checksum, or the count differs.
    """
    heads, offsets, end = bytearray(), [], 0
    file = open_file(path)
    try:
        while end + _HEAD <= file.size:
            head = file.read(end, _HEAD)
            heads += head
            offsets.append(end)
            end += _HEAD + int.from_bytes(head[:8], 'little') + _TAIL
    finally:
        file.close()
    head = np.frombuffer(heads, np.uint8).reshape(-1, _HEAD)
    _check_lengths(path, head, offsets)
    if end != file.size:
        whole, begun = (len(offsets) - 1, offsets[-1]) if end > file.size else (len(offsets), end)
        raise ValueError(f'{path!r} is cut off: record {whole} begins at byte {begun} and does not end before byte '
                         f'{file.size}, the end of the file; {_whole(whole, count)}; copy it or prepare it again')
    if count is not None and len(offsets) != count:
        raise ValueError(f'{path!r} ends too early or belongs to other data: {_whole(len(offsets), count)}; '
                         'copy it or prepare it again')
    return np.array(offsets, np.int64), np.ascontiguousarray(head[:, :8]).view('<i8').ravel()


def read_all(path: str, count: int | None = None) -> Iterator[bytes]:
    """The records of a file in order, their checksums compared.

    Raises:
      ValueError: as `scan`, or the data of a record have a wrong checksum.
    """
    offsets, lengths = scan(path, count)
    file = open_file(path)
    try:
        for number, (offset, length) in enumerate(zip(offsets.tolist(), lengths.tolist())):
            data = file.read(offset + _HEAD, length + _TAIL)
            if int.from_bytes(data[length:], 'little') != crc32c.mask(crc32c.crc_of(data[:length])):
                raise ValueError(f'{path!r}: the data of record {number} at byte {offset} have a wrong checksum; '
                                 'copy it or prepare it again')
            yield data[:length]
    finally:
        file.close()


def _check_lengths(path: str, head: np.ndarray, offsets: Sequence[int]) -> None:
    stored = np.ascontiguousarray(head[:, 8:]).view('<u4').ravel()
    wrong = np.flatnonzero(crc32c.mask(crc32c.crc_of_rows(head[:, :8])) != stored)
    if wrong.size:
        raise ValueError(f'{path!r}: the length of record {wrong[0]} at byte {offsets[wrong[0]]} has a wrong checksum '
                         f'({wrong[0]} records before it are whole); it is damaged or no TFRecord file')


def _whole(whole: int, count: int | None) -> str:
    return f'{whole:,} records are whole' + ('' if count is None else f', dataset_info.json counts {count:,}')
