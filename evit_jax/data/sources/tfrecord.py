"""Random access to TFRecord files without TensorFlow. An index holds the offsets of all records.

A record consists of its length (8 bytes, little-endian), a checksum of the length (4 bytes), the data, and a checksum
of the data (4 bytes). The checksums are masked CRC-32C. Building the index verifies the checksums of the lengths. The
checksums of the data are not verified.

Source: tensorflow.org/tutorials/load_data/tfrecord.
"""

import concurrent.futures
import os
import threading
from collections.abc import Sequence

import numpy as np
from etils import epath

from evit_jax.data.progress import Progress
from evit_jax.data.sources import index_cache

_HEAD, _TAIL = 12, 4  # bytes before and after the data
_SCANS = 16           # files scanned in parallel; scanning waits for the disk


class LocalFile:
    """Local file that supports concurrent reads at offsets."""

    def __init__(self, path: str):
        self._file = open(path, 'rb', buffering=0)  # noqa: SIM115 (closed with this object)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._file.fileno(), count, offset)

    def close(self) -> None:
        self._file.close()


class RemoteFile:
    """Remote file, such as gs://, that supports reads at offsets, one at a time."""

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
    """Records of a split as bytes, numbered across its files. Each process opens a file at its first read."""

    def __init__(self, files: Sequence[str], index: index_cache.Index, index_files: Sequence[str | os.PathLike] = ()):
        self._files, self._index_files = tuple(files), tuple(map(str, index_files))
        self._ends, self._offset, self._length = np.cumsum(index['count']), index['offset'], index['length']
        self._reset_files()

    def _reset_files(self):
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
        self._reset_files()


def open_records(files: Sequence[str], counts: Sequence[int], *, name: str, cache: str | None = None) -> TFRecords:
    """Opens the files of one split.

    Args:
      files: ordered paths in one folder. The index of the files is stored in this folder, or in `cache`.
      counts: expected number of records in each file.
      name: name of the split, for the index and the log.
      cache: see `index_cache.load_or_build`.

    Raises:
      ValueError: a file is truncated, damaged, or holds another number of records.
    """
    names = np.array([os.path.basename(file) for file in files], np.bytes_)
    with concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
        sizes = np.array([*pool.map(lambda file: epath.Path(file).stat().length, files)], np.int64)

    def is_current(index):
        return all(np.array_equal(index[key], value) for key, value in
                   {'name': names, 'size': sizes, 'count': counts}.items())

    def build():
        arrays = []
        progress = Progress(f'indexing {name!r}', int(sizes.sum()), 'B')
        with progress, concurrent.futures.ThreadPoolExecutor(_SCANS) as pool:
            scans = [pool.submit(scan, file, count) for file, count in zip(files, counts)]
            try:
                for size, future in zip(sizes.tolist(), scans):
                    arrays.append(future.result())
                    progress.add(size)
            finally:
                pool.shutdown(cancel_futures=True)
        offset, length = map(np.concatenate, zip(*arrays))
        return {'name': names, 'size': sizes, 'count': np.array(counts), 'offset': offset, 'length': length}

    location = {'name': f'tfrecord_{name}', 'data_folder': os.path.dirname(files[0]), 'cache': cache}
    index = index_cache.load_or_build(**location, is_current=is_current, build=build)
    return TFRecords(files, index, index_cache.index_files(**location))


def scan(path: str, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Reads the lengths of all records in a file, without the data.

    Args:
      count: expected number of records; None accepts any.

    Returns:
      Offsets of the records, and lengths of their data in bytes, both int64 [N].

    Raises:
      ValueError: the file is truncated, a length has a wrong checksum, or the count differs.
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


def _check_lengths(path: str, head: np.ndarray, offsets: Sequence[int]) -> None:
    """Raises a ValueError if a length does not match its checksum; `head` is uint8 [N, 12]."""
    from tensorboardX.record_writer import masked_crc32c  # imported here: it is slow, and only this function needs it
    stored = np.ascontiguousarray(head[:, 8:]).view('<u4').ravel().tolist()
    for record, (row, checksum) in enumerate(zip(head, stored)):
        if masked_crc32c(row[:8].tobytes()) != checksum:
            raise ValueError(f'{path!r}: the length of record {record} at byte {offsets[record]} has a wrong checksum '
                             f'({record} records before it are whole); it is damaged or no TFRecord file')


def _whole(whole: int, count: int | None) -> str:
    return f'{whole:,} records are whole' + ('' if count is None else f', dataset_info.json counts {count:,}')
