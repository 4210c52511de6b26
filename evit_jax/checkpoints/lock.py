"""Ensures that only one run at a time uses a workdir, with flock or, if locks are not supported, with heartbeats."""

import json
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from types import TracebackType

from absl import logging
from etils import epath

from evit_jax.runtime import storage
from evit_jax.runtime.file_lock import FileLock, LocksUnsupportedError

IN_USE_FILE = 'in_use.json'
_MIN_FREE = 64 * 2**20  # minimal free space on the disk of the workdir, in bytes
_BEAT_SECONDS = 20.0
_DEAD_AFTER = 2.25   # a run counts as dead after this many beats without a change
_SETTLE = 0.1        # number of beats after which two runs that start together see each other's file


class WorkdirLock:
    """Locks a workdir for the body of a `with`. Only process 0 of a run enters it.

    Local folder: the file `in_use.json` is locked with flock. The system frees the lock when the process ends or is
    killed.

    Bucket, or network file system without locks (ENOLCK, ENOSYS): the run rewrites the file every `beat_seconds`, as a
    heartbeat. A new run that finds the file waits for 2.25 beats. If the file changes in this time, the new run raises
    an error; otherwise it takes over. No clocks are compared. If a run cannot write a heartbeat in this time (suspended
    machine, unreachable bucket), another run may take over; the first run is then interrupted, as by Ctrl-C.

    Args:
      workdir: folder of the run; created if it does not exist.
      beat_seconds: time between two heartbeats.

    Raises:
      ValueError: another run uses the workdir (the message gives its host, process and start time), the workdir cannot
        be written, or its disk is full. At the end of the body: another run has taken over.
    """

    def __init__(self, workdir: str | os.PathLike, *, beat_seconds: float = _BEAT_SECONDS):
        self._folder, self._beat_seconds = storage.as_path(workdir), beat_seconds
        self._held: FileLock | _Heartbeat | None = None

    def __enter__(self) -> 'WorkdirLock':
        storage.make_writable(self._folder, f'workdir {self._folder}', 'give another --workdir')
        if storage.is_remote(self._folder):
            self._held = _Heartbeat(self._folder, self._beat_seconds)
            return self
        _check_free_space(self._folder)
        try:
            self._held = FileLock(self._folder / IN_USE_FILE, _owner())
        except BlockingIOError:
            raise ValueError(_refusal(self._folder, _read(self._folder / IN_USE_FILE))) from None
        except LocksUnsupportedError as error:
            logging.warning('%s is on a file system without locks (%s): heartbeats in %s replace the lock',
                            self._folder, error.strerror, IN_USE_FILE)
            self._held = _Heartbeat(self._folder, self._beat_seconds)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.release()
        taken_by = getattr(self._held, 'taken_by', None)
        if taken_by is not None and isinstance(error, KeyboardInterrupt):
            raise ValueError(f'{_refusal(self._folder, taken_by)}; it took over while this run sent no heartbeat') \
                from None


class _Heartbeat:
    """Locks a workdir by rewriting the file regularly in a thread.

    Attributes:
      taken_by: content of the file if another run has taken over, else None.

    Raises:
      ValueError: another run uses the workdir.
    """

    def __init__(self, folder: epath.Path, beat_seconds: float):
        self._folder, self._file, self._beat_seconds = folder, folder / IN_USE_FILE, beat_seconds
        self._id, self._since, self._beat = uuid.uuid4().hex, time.time(), 0
        self._ended = threading.Event()
        self.taken_by: bytes | None = None
        self._wait_for_dead_run()
        self._write()
        time.sleep(_SETTLE * self._beat_seconds)
        content = _read(self._file)
        if self._is_foreign(content):
            raise ValueError(_refusal(self._folder, content))
        self._thread = threading.Thread(target=self._keep_beating, name='heartbeat', daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Ends the thread and removes the file, unless another run has taken over."""
        self._ended.set()
        self._thread.join()
        if self.taken_by is not None:
            return
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            logging.warning('%s could not be removed (%s): the next start in %s waits for a heartbeat', self._file,
                            error, self._folder)

    def _wait_for_dead_run(self):
        """Waits until the file is gone or its run counts as dead."""
        first = _read(self._file)
        if not first:
            return
        wait = _DEAD_AFTER * self._beat_seconds
        logging.info('%s may be in use by %s: waiting %.0f s for a heartbeat', self._folder, _describe(first), wait)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            time.sleep(min(self._beat_seconds / 4, max(deadline - time.monotonic(), 0)))
            content = _read(self._file)
            if not content:
                return
            if content != first:
                raise ValueError(_refusal(self._folder, content))
        logging.warning('no heartbeat of %s in %.0f s: taking over', _describe(first), wait)

    def _keep_beating(self):
        while not self._ended.wait(self._beat_seconds):
            try:
                content = _read(self._file)
                if self._is_foreign(content):
                    self.taken_by = content
                    logging.error('%s', _refusal(self._folder, content))
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    return
                self._write()
            except Exception as error:  # the bucket cannot be reached; the libraries raise many types
                logging.warning('the heartbeat in %s failed this time: %s', self._file, error)

    def _is_foreign(self, content):
        return bool(content) and self._id.encode() not in content

    def _write(self):
        self._beat += 1
        storage.write_atomic(self._file, _owner(self._since, run=self._id, beat=self._beat))


def _check_free_space(folder):
    if (free := shutil.disk_usage(folder).free) < _MIN_FREE:
        raise ValueError(f'workdir {folder} has {free / 2**20:.0f} MiB free, a run needs at least '
                         f'{_MIN_FREE // 2**20}: make room or give another --workdir')


def _read(file):
    """Returns the content of the file; empty if the file does not exist."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b''


def _owner(since=None, **more):
    """Returns the JSON content of the file: this process, its host and the start time of the run."""
    since = time.strftime('%Y-%m-%d %H:%M:%S %z', time.localtime(since))
    return json.dumps({'host': socket.gethostname(), 'pid': os.getpid(), 'since': since} | more).encode() + b'\n'


def _describe(content):
    """Describes the owner named in the content. A file that was just locked is still empty."""
    try:
        owner = json.loads(content)
        return f'process {owner["pid"]} on {owner["host"]}, since {owner["since"]}'
    except (ValueError, LookupError, TypeError):
        return 'a process that has just started'


def _refusal(folder, content):
    return (f'workdir {folder} is in use by another run ({_describe(content)}): wait for its end or stop it, or give '
            'another --workdir')
