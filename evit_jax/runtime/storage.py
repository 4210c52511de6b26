"""Reads and writes the files of a run, in a local folder or in a bucket of Google Cloud Storage (`gs://bucket/run`)."""

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

_GCS_PACKAGES = ('fsspec', 'gcsfs', 'google.cloud.storage')  # the last is needed by Orbax, the others by etils
# System errors that mean a missing or damaged file. All other ones mean a limit of the machine.
_FILE_ERRORS = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG}
_SYSTEM_ERROR = re.compile(r"os_error_code='?(\w+)")  # the way tensorstore reports a system error


def is_remote(path: str | os.PathLike) -> bool:
    """Returns True if the path is an address such as `gs://bucket/run`, and False for a local path."""
    return '://' in os.fspath(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """Returns an absolute path with one interface for local files and buckets. Accesses neither.

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
    os.environ.setdefault('EPATH_USE_TF', 'false')  # etils would import TensorFlow if it is installed
    try:
        fsspec, *_ = [importlib.import_module(name) for name in _GCS_PACKAGES]
    except ImportError as error:
        raise ValueError(f"{text} needs packages for Google Cloud Storage: pip install 'evit_jax[gcs]' "
                         f'({error})') from error
    # etils reads this setting. Listings must not be cached: other processes may write to the bucket at any time.
    fsspec.config.conf.setdefault('gs', {}).setdefault('use_listings_cache', False)
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs every exception that it also raises
    return epath.Path(text)


def make_writable(folder: epath.Path | pathlib.Path, subject: str, way_out: str) -> None:
    """Creates a folder if it does not exist, and checks that files can be written in it.

    Args:
      folder: local folder, or one in a bucket.
      subject: beginning of the message, such as '--out=DIR'.
      way_out: advice at the end of the message.

    Raises:
      ValueError: it cannot be written.
    """
    probe = folder / f'.{uuid.uuid4().hex[:8]}.probe'
    try:
        with explain_bucket_errors(folder):
            if not is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b'probe')
            probe.unlink()
    except OSError as error:
        raise ValueError(f'{subject} cannot be written ({error.strerror or error}): {way_out}') from error


def write_atomic(file: epath.Path | pathlib.Path, content: bytes) -> None:
    """Writes a file so that readers see the old content or the new one, even after a kill or a power failure."""
    with open_atomic(file) as writer:
        writer.write(content)


@contextlib.contextmanager
def open_atomic(file: epath.Path | pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing. It replaces the old one at the end of the body, or is removed if the body fails."""
    if is_remote(file):  # an object appears when it is complete
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
    except BaseException:  # a full disk, as a rule
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a local folder that gets its final name at the end of the body, or is removed if the body fails."""
    unfinished = folder.with_name(f'{folder.name}.unfinished-{uuid.uuid4().hex[:8]}')
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder and its content; creates the parents of the target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):  # a bucket has no folder to rename
        importlib.import_module('fsspec').filesystem('gs').mv(str(folder), str(target), recursive=True)
    else:
        folder.rename(target)


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies all files below a local folder."""
    for file in folder.rglob('*'):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def is_machine_failure(error: BaseException) -> bool:
    """Returns True if a read failed at a limit of this machine (memory, permission, open files, JAX), not of the file.
    """
    from jax.errors import JaxRuntimeError  # slow to import, and the metric writers do not need JAX
    if isinstance(error, MemoryError | JaxRuntimeError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _FILE_ERRORS
    match = _SYSTEM_ERROR.search(str(error))
    return bool(match) and getattr(errno, match[1], None) not in _FILE_ERRORS


@contextlib.contextmanager
def explain_bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns each error of the body into one line about the bucket; the libraries raise many types.

    Errors of a local path pass unchanged.

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
