"""Files that grow: appended to in a folder; in a bucket, whose objects cannot be appended to, written anew."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from absl import logging
from etils import epath

from evit_jax.runtime import storage

_SECONDS = 30.0       # from one writing of an object to the next
_PART_BYTES = 2**20   # an object that is larger is written no more: another one goes on


class AppendFile(Protocol):
    """What is common to both."""

    def write(self, record: bytes) -> None:
        """Puts a record at the end."""

    def flush(self) -> None:
        """Returns when every record so far is kept."""

    def close(self) -> None:
        """Flushes and lets go."""


def open_append_file(name: Callable[[int], epath.Path], *, head: bytes = b'',
                     mend: Callable[[bytes], bytes] = bytes) -> AppendFile:
    """Goes on with the last file that is there, or begins with the first.

    Args:
      name: of the part with a number from 0 on; a folder has no other than the first.
      head: what every new file begins with.
      mend: makes of the content of a file that is there one that can be continued.
    """
    number, file = max(enumerate(parts(name)), default=(0, name(0)))
    content = file.read_bytes() if file.exists() else b''
    mended = mend(content) or head
    if storage.is_remote(file):
        return _Rewritten(name, number, mended, head)
    file.parent.mkdir(parents=True, exist_ok=True)
    if mended != content:
        storage.write_atomic(file, mended)
    return _Appended(file)


def parts(name: Callable[[int], epath.Path]) -> Iterator[epath.Path]:
    """The files that are there."""
    number = 0
    while (file := name(number)).exists():
        yield file
        number += 1


class _Appended:
    """A record is handed to the system whole before `write` returns, and reaches the disk at `flush`."""

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


class _Rewritten:
    """Records are kept here and written by a thread, every 30 s; a process that is killed loses those since then.

    Writing costs no more as the run grows: an object that has reached 1 MiB is done. If the bucket cannot be reached
    the records wait, and the run goes on.
    """

    def __init__(self, name, number, content, head):
        self._name, self._number, self._head = name, number, head
        self._content = bytearray(content)
        self._full: list[tuple[epath.Path, bytes]] = []  # parts to be written for the last time
        self._written = len(content)
        self._lock, self._writing, self._ended = threading.Lock(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name='growing objects', daemon=True)
        self._thread.start()

    def write(self, record):
        with self._lock:
            self._content += record
            if len(self._content) >= _PART_BYTES:
                self._full.append((self._name(self._number), bytes(self._content)))
                self._number, self._content, self._written = self._number + 1, bytearray(self._head), 0

    def flush(self):
        try:
            self._put()
        except Exception as error:  # a bucket out of reach, in as many ways as there are libraries between
            logging.warning('%s could not be written (%s): what it lacks is tried again until the run ends',
                            self._name(self._number), error)

    def close(self):
        self._ended.set()
        self._thread.join()
        self.flush()

    def _keep_writing(self):
        while not self._ended.wait(_SECONDS):
            self.flush()

    def _put(self):
        with self._writing:
            while self._full:
                storage.write_atomic(*self._full[0])
                del self._full[0]
            with self._lock:
                file, content = self._name(self._number), bytes(self._content)
                number, due = self._number, len(content) > self._written and content != self._head
            if due:
                storage.write_atomic(file, content)
                with self._lock:
                    self._written = len(content) if number == self._number else self._written
