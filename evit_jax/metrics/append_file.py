"""Append-only files for metrics: one file in a local folder, or several objects in a bucket."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from absl import logging
from etils import epath

from evit_jax.runtime import storage

_WRITE_SECONDS = 30.0  # seconds between two writes of an object
_PART_BYTES = 2**20    # size at which an object is complete; later records go into the next object


class AppendFile(Protocol):
    """A file for appending records; see `open_append_file`."""

    def write(self, record: bytes) -> None:
        """Appends a record."""

    def flush(self) -> None:
        """Waits until all records are stored durably."""

    def close(self) -> None:
        """Flushes and closes the file. Do not write afterwards."""


def open_append_file(part_path: Callable[[int], epath.Path], *, header: bytes = b'',
                     repair: Callable[[bytes], bytes] = bytes) -> AppendFile:
    """Opens the last existing part for appending, or creates the first part.

    Args:
      part_path: part number (from 0) -> path of the part. A local folder has only the first part.
      header: content at the start of every new part.
      repair: content of an existing part -> the content without an incomplete last record.
    """
    number, file = max(enumerate(existing_parts(part_path)), default=(0, part_path(0)))
    content = file.read_bytes() if file.exists() else b''
    repaired = repair(content) or header
    if storage.is_remote(file):
        return _BucketAppendFile(part_path, number, repaired, header)
    file.parent.mkdir(parents=True, exist_ok=True)
    if repaired != content:
        storage.write_atomic(file, repaired)
    return _LocalAppendFile(file)


def existing_parts(part_path: Callable[[int], epath.Path]) -> Iterator[epath.Path]:
    """Yields the paths of the parts that exist, in order."""
    number = 0
    while (file := part_path(number)).exists():
        yield file
        number += 1


class _LocalAppendFile:
    """Writes each record to the system at once, and to the disk at `flush`. A killed process loses no record."""

    def __init__(self, file):
        self._file = open(file, 'ab')  # noqa: SIM115 (held until `close`)

    def write(self, record):
        self._file.write(record)
        self._file.flush()

    def flush(self):
        os.fsync(self._file.fileno())

    def close(self):
        self.flush()
        self._file.close()


class _BucketAppendFile:
    """Buffers records in memory. A thread writes them to the bucket every 30 s.

    A killed process loses the records since the last write. Each write uploads the current part, which is complete at
    1 MiB, so the cost does not grow with the run. If the bucket cannot be reached, the records stay in memory.
    """

    def __init__(self, part_path, number, content, header):
        self._part_path, self._number, self._header = part_path, number, header
        self._content = bytearray(content)
        self._complete: list[tuple[epath.Path, bytes]] = []  # complete parts that are not yet written
        self._num_written = len(content)  # number of bytes of the current part in the bucket
        self._lock, self._writing, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._flush_repeatedly, name='append to bucket', daemon=True)
        self._thread.start()

    def write(self, record):
        with self._lock:
            self._content += record
            if len(self._content) >= _PART_BYTES:
                self._complete.append((self._part_path(self._number), bytes(self._content)))
                self._number, self._content, self._num_written = self._number + 1, bytearray(self._header), 0

    def flush(self):
        try:
            self._write_parts()
        except Exception as error:  # the bucket cannot be reached; the libraries raise many types
            logging.warning('%s could not be written (%s): its records stay in memory and are written later',
                            self._part_path(self._number), error)

    def close(self):
        self._ended.set()
        self._thread.join()
        self.flush()

    def _flush_repeatedly(self):
        while not self._ended.wait(_WRITE_SECONDS):
            self.flush()

    def _write_parts(self):
        with self._writing:
            while self._complete:
                storage.write_atomic(*self._complete[0])
                del self._complete[0]
            with self._lock:
                number, content = self._number, bytes(self._content)
                due = len(content) > self._num_written and content != self._header
            if due:
                storage.write_atomic(self._part_path(number), content)
                with self._lock:
                    self._num_written = len(content) if number == self._number else self._num_written
