"""One run at a time in a workdir: a lock that the system frees, or signs of life where there are no locks."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from absl import logging

from evit_jax.runtime import storage

IN_USE_FILE = 'in_use.json'
_BEAT_SECONDS = 20.0
_WAIT_BEATS = 2.25    # without a sign of life, after which a run counts as dead
_SETTLE_BEATS = 0.1   # in which two that start at the same moment see each other
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_DESCRIPTORS: set[int] = set()  # of the locks held here


@contextlib.contextmanager
def WorkdirLock(workdir: str | os.PathLike, *, beat_seconds: float = _BEAT_SECONDS) -> Iterator[None]:
    """Holds the workdir, which is made if need be, for the run in the body; one process of a run calls it.

    In a folder the file `in_use.json` is locked: the system frees it however the process ends. In a bucket, and on a
    file system without locks, that file is written anew every `beat_seconds`. A start that finds one there waits 2.25
    times as long: it refuses if the file changes, and takes over if not, whatever the clocks say. A run that cannot
    write for so long (a suspended machine, a bucket out of reach) may find that another has taken over: it is then
    interrupted, as by Ctrl-C.

    Raises:
      ValueError: another run holds it; names its host, process and start. Or it cannot be written.
    """
    folder = storage.as_path(workdir)
    storage.make_writable(folder)
    lock = None if storage.is_remote(folder) else _lock(folder)
    if lock is not None:
        try:
            yield
        finally:
            (folder / IN_USE_FILE).unlink(missing_ok=True)
            _DESCRIPTORS.discard(lock)
            os.close(lock)
        return
    life = _SignsOfLife(folder, beat_seconds)
    life.begin()
    try:
        yield
    except KeyboardInterrupt:
        if life.lost is None:
            raise
        raise ValueError(f'{_refusal(folder, life.lost)}; it took over while this run gave no sign of life') from None
    finally:
        life.end()


def _lock(folder):
    """A descriptor of the locked file, or None where there are no locks."""
    file = folder / IN_USE_FILE
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            content = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise ValueError(_refusal(folder, content)) from None
            if error.errno not in _NO_LOCKS:
                raise
            logging.warning('%s is on a file system without locks (%s): signs of life in %s take their place', folder,
                            error.strerror, IN_USE_FILE)
            return None
        # The one that ended just now may have removed the file between the two calls.
        if file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(file)):
            break
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, _mark(), 0)
    _DESCRIPTORS.add(descriptor)
    return descriptor


def _let_go_in_child():
    """A child that outlives its parent must not keep the lock."""
    while _DESCRIPTORS:
        os.close(_DESCRIPTORS.pop())


os.register_at_fork(after_in_child=_let_go_in_child)


class _SignsOfLife:
    """The file that is written anew again and again.

    Attributes:
      lost: content of the file where another run has taken over.
    """

    def __init__(self, folder, beat_seconds):
        self._folder, self._file, self._beat_seconds = folder, folder / IN_USE_FILE, beat_seconds
        self._name, self._since, self._beat = uuid.uuid4().hex, time.time(), 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name='signs of life', daemon=True)
        self.lost = None

    def begin(self):
        """Takes the workdir.

        Raises:
          ValueError: another run has it.
        """
        self._wait_for_the_dead()
        self._write()
        time.sleep(_SETTLE_BEATS * self._beat_seconds)
        if self._foreign(found := self._read()):
            raise ValueError(_refusal(self._folder, found))
        self._thread.start()

    def end(self):
        """Removes the file, unless it is another's."""
        self._ended.set()
        self._thread.join()
        if self.lost is None:
            try:
                self._file.unlink(missing_ok=True)
            except OSError as error:
                logging.warning('%s could not be removed (%s): the next start in %s waits for it', self._file, error,
                                self._folder)

    def _wait_for_the_dead(self):
        first = self._read()
        if not first:
            return
        wait = _WAIT_BEATS * self._beat_seconds
        logging.info('%s says that it is in use (%s): waiting %.0f s for a sign of life', self._folder, _said(first),
                     wait)
        until = time.monotonic() + wait
        while time.monotonic() < until:
            time.sleep(min(self._beat_seconds / 4, max(until - time.monotonic(), 0)))
            found = self._read()
            if not found:
                return
            if found != first:
                raise ValueError(_refusal(self._folder, found))
        logging.warning('%s gave no sign of life in %.0f s: taking over', _said(first), wait)

    def _keep_beating(self):
        while not self._ended.wait(self._beat_seconds):
            try:
                found = self._read()
                if self._foreign(found):
                    self.lost = found
                    logging.error('%s', _refusal(self._folder, found))
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    return
                self._write()
            except Exception as error:  # a bucket out of reach, in as many ways as there are libraries between
                logging.warning('no sign of life in %s this time: %s', self._file, error)

    def _foreign(self, found):
        return bool(found) and self._name.encode() not in found

    def _read(self):
        """What the file holds, empty where there is none."""
        try:
            return self._file.read_bytes()
        except FileNotFoundError:
            return b''

    def _write(self):
        self._beat += 1
        storage.write_atomic(self._file, _mark(self._since, run=self._name, beat=self._beat))


def _mark(since=None, **more):
    since = time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(since))
    return json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'since': since} | more).encode() + b'\n'


def _said(content):
    """Who wrote the file; with locks it may have been read before that was written."""
    try:
        mark = json.loads(content)
        return f'process {mark["pid"]} on {mark["host"]}, since {mark["since"]}'
    except (ValueError, LookupError, TypeError):
        return 'a process that has not said who it is'


def _refusal(folder, content):
    return (f'workdir {folder} is in use by another run ({_said(content)}): wait for its end or stop it, or give '
            'another --workdir')
