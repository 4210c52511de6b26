"""Where a run may keep its files: a folder of this machine, or a bucket of Google Cloud Storage (`gs://bucket/run`)."""

import contextlib
import errno
import importlib
import logging
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator

from etils import epath

_NEEDED = ('fsspec', 'gcsfs', 'google.cloud.storage')  # by etils; the last by Orbax
_NEED_FREE = 64 * 2**20
_OF_FILES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG}  # a file is not whole
_SYSTEM = re.compile(r"os_error_code='?(\w+)")  # tensorstore's report of a system error


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is an address, and not one of this machine's own."""
    return '://' in os.fspath(path)


def as_path(path: str | os.PathLike) -> epath.Path:
    """The path as something that is read and written alike, wherever it is; nothing is looked up.

    Raises:
      ValueError: an address of another kind than `gs://bucket/...`, or the packages for it are not installed.
    """
    text = os.fspath(path)
    if not is_remote(path):
        return epath.Path(text).expanduser().resolve()
    scheme, _, rest = text.partition('://')
    if scheme != 'gs':
        raise ValueError(f'{text} cannot be used: give a folder of this machine, or gs://bucket/folder')
    if not rest.partition('/')[2].strip('/') or rest.startswith('/'):
        raise ValueError(f'{text} names no folder in a bucket: give gs://bucket/folder')
    os.environ.setdefault('EPATH_USE_TF', 'false')  # etils would import TensorFlow wherever it is installed
    try:
        fsspec, *_ = [importlib.import_module(name) for name in _NEEDED]
    except ImportError as error:
        raise ValueError(f"{text} needs packages for Google Cloud Storage: pip install 'evit_jax[gcs]' "
                         f'({error})') from error
    # What etils makes its file system with: another process may write to the bucket at any time.
    fsspec.config.conf.setdefault('gs', {}).setdefault('use_listings_cache', False)
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs, with a traceback, what it raises as well
    return epath.Path(text)


def make_writable(folder: epath.Path) -> None:
    """Makes the folder if need be.

    Raises:
      ValueError: it cannot be written, or has no room.
    """
    if is_remote(folder):
        probe = folder / f'.{os.getpid()}.probe'
        with explain_bucket_errors(folder):
            probe.write_bytes(b'may this be written?')
            probe.unlink()
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f'workdir {folder} cannot be written ({error.strerror}): give another --workdir') from error
    if (free := shutil.disk_usage(folder).free) < _NEED_FREE:
        raise ValueError(f'workdir {folder} has {free / 2**20:.0f} MiB free, a run needs at least '
                         f'{_NEED_FREE // 2**20}: make room or give another --workdir')


def write_atomic(file: epath.Path, content: bytes) -> None:
    """Puts the content in the file's place; who reads it meanwhile, or after a kill, finds the old one or the new."""
    if is_remote(file):  # an object appears when it is complete
        file.write_bytes(content)
        return
    temporary = file.with_name(f'.{file.name}.{uuid.uuid4().hex[:8]}')
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError:  # no room, as a rule
        temporary.unlink(missing_ok=True)
        raise


def move(folder: epath.Path, target: epath.Path) -> None:
    """Moves a folder with all that it holds; where it goes is made if need be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(folder):  # a bucket has no folder to rename
        importlib.import_module('fsspec').filesystem('gs').mv(str(folder), str(target), recursive=True)
    else:
        folder.rename(target)


def upload(folder: pathlib.Path, target: epath.Path) -> None:
    """Copies the files of a folder of this machine, with those of the folders in it."""
    for file in folder.rglob('*'):
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())


def is_machine_failure(error: BaseException) -> bool:
    """True where a limit of this machine (memory, permission, open files, JAX) made a read fail, and not the file."""
    from jax.errors import JaxRuntimeError  # here, as writers of metrics need no JAX and it is slow to import
    if isinstance(error, MemoryError | JaxRuntimeError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in _OF_FILES
    found = _SYSTEM.search(str(error))
    return bool(found) and getattr(errno, found[1], None) not in _OF_FILES


@contextlib.contextmanager
def explain_bucket_errors(path: str | os.PathLike) -> Iterator[None]:
    """Gives what goes wrong in the body with a bucket one line, for the libraries between raise many kinds.

    Raises:
      ValueError: the bucket does not exist, refuses access, or is out of reach.
    """
    try:
        yield
    except Exception as error:
        if not is_remote(path) or type(error) is ValueError:
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        said = 'not found' if isinstance(error, FileNotFoundError) else lines[-1].strip()
        raise ValueError(f'{path} cannot be used ({said}): check that the bucket exists and that this '
                         'machine may read and write it (gcloud auth application-default login)') from error
