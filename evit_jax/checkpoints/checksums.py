"""Checksums of the files of a checkpoint. Orbax stores no checksums, so it would not detect a flipped bit."""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent import futures

from etils import epath

FILE = 'checksums.json'
# Orbax writes these files at the commit, after the checksums. They are not needed to restore a checkpoint.
_COMMIT_FILES = ('_CHECKPOINT_METADATA', 'commit_success.txt')
_CHUNK = 2**22  # number of bytes that a thread reads at a time
_THREADS = 8


def write(folder: str | os.PathLike) -> None:
    """Writes the size and CRC-32 of all files in a folder and its subfolders to `checksums.json` in the folder.

    Call it before the folder gets its final name, so that every committed checkpoint has checksums.
    """
    folder = epath.Path(folder)
    names = [name for name in _files(folder) if name not in (*_COMMIT_FILES, FILE)]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _checksum(folder / name), names)
        (folder / FILE).write_text(json.dumps(dict(zip(names, sums))) + '\n')


def check(folder: str | os.PathLike) -> bool:
    """Compares the files in a folder and its subfolders with their checksums.

    Returns:
      True if all files are intact; False if the folder has no checksums (a checkpoint of an older version).

    Raises:
      ValueError: a file is missing, truncated or changed. The message names the first such file.
    """
    folder = epath.Path(folder)
    if not (folder / FILE).exists():
        return False
    try:
        sums = {name: (int(size), int(crc)) for name, (size, crc) in json.loads((folder / FILE).read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:  # not UTF-8, not JSON, or not pairs of numbers
        raise ValueError(f'{FILE} is damaged ({error})') from error
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        problems = pool.map(lambda name: _problem(folder / name, *sums[name]), sums)
        for name, problem in zip(sums, problems):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f'{name} {problem}')
    return True


def _problem(file, size, crc) -> str:
    """Describes the difference between a file and its checksum; '' if there is none."""
    try:
        actual_size, actual_crc = _checksum(file)
    except FileNotFoundError:
        return 'is missing'
    if actual_size != size:
        return f'has {actual_size} bytes, {size} were written'
    return '' if actual_crc == crc else f'holds other bytes than were written (CRC-32 {actual_crc:08x}, not {crc:08x})'


def _checksum(file) -> tuple[int, int]:
    """Returns the size and CRC-32 of a file."""
    size = crc = 0
    with file.open('rb') as reader:
        while chunk := reader.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _files(folder, prefix: str = '') -> Iterator[str]:
    """Yields the relative paths of all files in a folder and its subfolders, sorted."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from _files(path, f'{prefix}{path.name}/')
        else:
            yield prefix + path.name
