"""Reads and writes the files of a run in a local folder or a Google Cloud Storage bucket (`gs://bucket/run`)."""

import contextlib
import errno
import importlib
import logging
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from evit_jax.runtime.file_lock import FileLock, LocksUnsupportedError

_GCS_PACKAGES = ('fsspec', 'gcsfs', 'google.cloud.storage')  # Orbax needs the last, etils the others
# System errors of a missing or damaged file. All other system errors are failures of the machine.
_FILE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG}
_SYSTEM_ERROR = re.compile(r"os_error_code='?(\w+)")  # a system error in tensorstore's messages


def is_remote(path: str | os.PathLike) -> bool:
    """Returns True for a bucket address such as `gs://bucket/run`, False for a local path."""
    return '://' in os.fspath(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """Returns an absolute path object for a local path or a bucket address. Does not access the file system.

    Raises:
      ValueError: the address is not of the form `gs://bucket/...`, or the packages for it are not installed.
    """
    text = os.fspath(path)
    if not is_remote(path):
        return epath.Path(text).expanduser().resolve()
    scheme, _, rest = text.partition('://')
    if scheme != 'gs':
        raise ValueError(f'{text} cannot be used: give a folder of this machine, or gs://bucket/folder')
    if not rest.partition('/')[2].strip('/') or rest.startswith('/'):
        raise ValueError(f'{text} names no folder in a bucket: give gs://bucket/folder')
    os.environ.setdefault('EPATH_USE_TF', 'false')  # otherwise etils imports TensorFlow if it is installed
    try:
        fsspec, *_ = [importlib.import_module(name) for name in _GCS_PACKAGES]
    except ImportError as error:
        raise ValueError(f"{text} needs packages for Google Cloud Storage: pip install 'evit_jax[gcs]' "
                         f'({error})') from error
    # etils reads this setting. Do not cache listings, because other processes may write to the bucket at any time.
    fsspec.config.conf.setdefault('gs', {}).setdefault('use_listings_cache', False)
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # gcsfs logs every exception that it raises
    return epath.Path(text)


def make_writable(folder: epath.Path | pathlib.Path, label: str, way_out: str) -> None:
    """Creates a folder if it does not exist, and checks that files can be written in it.

    Args:
      folder: a local folder or a folder in a bucket.
      label: name of the folder, at the start of the error message, such as '--out=DIR'.
      way_out: advice to the user, at the end of the error message.

    Raises:
      ValueError: the folder cannot be written.
    """
    probe = folder / f'.{uuid.uuid4().hex[:8]}.probe'
    try:
        with explain_bucket_errors(folder):
            if not is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            write_atomic(probe, b'probe')
            probe.unlink()
    except OSError as error:
        raise ValueError(f'{label} cannot be written ({error.strerror or error}): {way_out}') from error


def write_atomic(file: epath.Path | pathlib.Path, content: bytes) -> None:
    """Writes a file atomically: readers see the old or the new content, even after a kill or a power failure."""
    with open_atomic(file) as writer:
        writer.write(content)


@contextlib.contextmanager
def open_atomic(file: epath.Path | pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a new version of a file for writing. It replaces the file at the end of the body unless the body fails."""
    if is_remote(file):  # an object in a bucket is visible only when complete
        with file.open('wb') as writer:
            yield writer
        return
    temporary = file.with_name(f'.{file.name}.{uuid.uuid4().hex[:8]}')
    try:
        with temporary.open('wb') as writer:
            yield writer
            writer.flush()
            os.fsync(writer.fileno())
        temporary.replace(file)
    except BaseException:  # usually a full disk
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, num_bytes: int = 0) -> Iterator[epath.Path | pathlib.Path]:
    """Yields a folder to write to, and removes it if the body fails.

    A local folder has a temporary name until the body ends, NAME.unfinished-... Those of killed processes are removed
    first. A folder in a bucket has its final name from the start, because it cannot be renamed.

    Args:
      path: path of the new folder.
      num_bytes: number of bytes that the body writes.

    Raises:
      ValueError: a local folder cannot be written, exists at the end, or its disk has less free space than
        `num_bytes`.
    """
    lock, folder = None, as_path(path)
    unfinished = folder
    if not is_remote(path):
        folder = pathlib.Path(folder)
        unfinished = folder.with_name(f'{folder.name}.unfinished-{uuid.uuid4().hex[:8]}')
    try:
        if not is_remote(path):
            if folder.parent.exists() and not folder.parent.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            folder.parent.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
            lock = _lock_unfinished(unfinished)
        unfinished.mkdir(parents=True)
        if not is_remote(path) and (free := shutil.disk_usage(unfinished).free) < num_bytes:
            raise OSError(errno.ENOSPC, f'{free / 1e6:.1f} MB free, {num_bytes / 1e6:.1f} MB to write')
        yield unfinished
        if unfinished != folder:
            unfinished.rename(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            as_path(unfinished).rmtree(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise ValueError(f'{path} was written by another program in the meantime, and is not overwritten: give '
                             'another folder') from error
        if isinstance(error, OSError) and not is_remote(path):
            raise ValueError(f'{path} cannot be written ({error.strerror or error}): free space there, or give another '
                             'folder') from error
        raise
    finally:
        if lock:
            lock.release()


def _lock_unfinished(unfinished):
    """Locks an unfinished folder by a file next to it. Returns None if the file system has no locks."""
    try:
        return FileLock(f'{unfinished}.lock', b'')
    except LocksUnsupportedError:
        return None


def _remove_unfinished(folder):
    """Removes the unfinished folders of killed processes. A running process holds a lock on its own."""
    pattern = re.compile(rf'({re.escape(folder.name)}\.unfinished-[0-9a-f]{{8}})(\.lock)?')
    names = {match[1] for path in folder.parent.iterdir() if (match := pattern.fullmatch(path.name))}
    for unfinished in map(folder.with_name, names):
        with contextlib.suppress(BlockingIOError):
            if lock := _lock_unfinished(unfinished):
                shutil.rmtree(unfinished, ignore_errors=True)
                lock.release()


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder with its content. Creates the parent folders of the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):  # a folder in a bucket cannot be renamed
        importlib.import_module('fsspec').filesystem('gs').mv(str(folder), str(target), recursive=True)
    else:
        folder.rename(target)


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies all files in a local folder and its subfolders to the target."""
    for file in folder.rglob('*'):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def is_machine_failure(error: BaseException) -> bool:
    """Returns True if this machine caused a failed read (memory, permissions, open files, JAX), and not the file."""
    from jax.errors import JaxRuntimeError  # a slow import, which the metric writers do not need
    if isinstance(error, MemoryError | JaxRuntimeError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _FILE_ERRORS
    match = _SYSTEM_ERROR.search(str(error))
    return bool(match) and getattr(errno, match[1], None) not in _FILE_ERRORS


@contextlib.contextmanager
def explain_bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns each error of the body into a one-line error about the bucket. The libraries raise many types.

    For a local path, errors are not changed.

    Raises:
      ValueError: the bucket does not exist, refuses access, or cannot be reached.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or type(error) is ValueError:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = 'not found' if isinstance(error, FileNotFoundError) else lines[-1].strip()
        raise ValueError(f'{path} cannot be used ({reason}): check that the bucket exists and that this '
                         'machine may read and write it (gcloud auth application-default login)') from error
