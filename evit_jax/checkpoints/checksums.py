"""Sums of a checkpoint's files: its arrays carry none, and a bit that flips on disk would be trained on in silence."""

import json
import os
import zlib
from collections.abc import Iterator
from concurrent import futures

from etils import epath

FILE = 'checksums.json'
# Orbax writes these at the very commit, after the sums; nothing that is restored depends on them.
_LATER = ('_CHECKPOINT_METADATA', 'commit_success.txt')
_CHUNK = 2**22  # bytes held of a file, of each thread
_THREADS = 8


def write(folder: str | os.PathLike) -> None:
    """Puts size and CRC-32 of every file below a folder into it, as `checksums.json`.

    To be called before the folder gets its final name, so that there are never half the sums in a finished one.
    """
    folder = epath.Path(folder)
    names = [name for name in _files(folder) if name not in (*_LATER, FILE)]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: _sum(folder / name), names)
        (folder / FILE).write_text(json.dumps(dict(zip(names, sums))) + '\n')


def check(folder: str | os.PathLike) -> bool:
    """Compares the files with their sums.

    Returns:
      Whether there are sums: a checkpoint of an older version has none, and passes.

    Raises:
      ValueError: a file is missing, cut, or otherwise not what was written; names the first.
    """
    folder = epath.Path(folder)
    if not (folder / FILE).exists():
        return False
    try:
        sums = {name: (int(size), int(crc)) for name, (size, crc) in json.loads((folder / FILE).read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:  # the first: no UTF-8, no JSON, or not two numbers
        raise ValueError(f'{FILE} is damaged ({error})') from error
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _problem(folder / name, *sums[name]), sums)
        for name, problem in zip(sums, found):
            if problem:
                pool.shutdown(cancel_futures=True)
                raise ValueError(f'{name} {problem}')
    return True


def _problem(file, size, crc) -> str:
    try:
        now = _sum(file)
    except FileNotFoundError:
        return 'is missing'
    if now[0] != size:
        return f'has {now[0]} bytes, {size} were written'
    return '' if now[1] == crc else f'holds other bytes than were written (CRC-32 {now[1]:08x}, not {crc:08x})'


def _sum(file) -> tuple[int, int]:
    """Size and CRC-32 of a file's bytes."""
    size = crc = 0
    with file.open('rb') as reader:
        while chunk := reader.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return size, crc


def _files(folder, prefix: str = '') -> Iterator[str]:
    """Names of all files below a folder, as seen from it, in order."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.is_dir():
            yield from _files(path, f'{prefix}{path.name}/')
        else:
            yield prefix + path.name
