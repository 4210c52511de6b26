"""Locks a file with flock. The system frees the lock when the process ends, even if it is killed."""

import errno
import fcntl
import os

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_OPEN_DESCRIPTORS: set[int] = set()  # descriptors of the files that this process has locked


class LocksUnsupportedError(OSError):
    """The file system has no locks."""


class FileLock:
    """An exclusive lock on a file that exists while the lock is held.

    A forked child does not inherit the lock, because the child may outlive its parent.

    Args:
      file: path of the file; created if it does not exist. Its old content is replaced.
      content: text of the file while it is locked.

    Raises:
      BlockingIOError: another process holds the lock.
      LocksUnsupportedError: the file system has no locks.
    """

    def __init__(self, file: str | os.PathLike, content: bytes):
        self._file, self._descriptor = os.fspath(file), _lock(os.fspath(file))
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, content, 0)
        _OPEN_DESCRIPTORS.add(self._descriptor)

    def release(self) -> None:
        """Removes the file, then frees the lock. Does nothing in a forked child."""
        if self._descriptor not in _OPEN_DESCRIPTORS:
            return
        if os.path.exists(self._file):
            os.unlink(self._file)
        _OPEN_DESCRIPTORS.discard(self._descriptor)
        os.close(self._descriptor)


def _lock(file):
    """Locks the file; returns its descriptor."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                raise LocksUnsupportedError(error.errno, error.strerror, file) from error
            raise
        # The previous owner may have removed the file between `open` and `flock`. A lock on a removed file has no
        # effect, so retry.
        if os.path.exists(file) and os.path.samestat(os.fstat(descriptor), os.stat(file)):
            return descriptor
        os.close(descriptor)


def _close_in_child():
    while _OPEN_DESCRIPTORS:
        os.close(_OPEN_DESCRIPTORS.pop())


os.register_at_fork(after_in_child=_close_in_child)
