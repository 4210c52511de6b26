"""Entries of image folders. Hidden ones are skipped and links are followed."""

import os
from collections.abc import Hashable, Sequence

from evit_jax.data.names import in_one_line
from evit_jax.data.transforms.decode import SUFFIXES

MAX_SEARCHED = 50  # subfolders of a folder that are searched for a hint in an error
MAX_DEPTH = 4      # levels of subfolders that are searched
_IGNORED = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found')  # folders that archives and disks add


def entries(folder: str) -> list[os.DirEntry]:
    """Returns the entries of a folder, sorted by name, without hidden ones.

    Raises:
      OSError: the folder is absent or unreadable.
    """
    try:
        with os.scandir(folder) as scanned:
            return sorted((entry for entry in scanned if not entry.name.startswith('.') and entry.name not in _IGNORED),
                          key=lambda entry: entry.name)
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no folder {folder!r}') from None
    except NotADirectoryError:
        raise NotADirectoryError(f'{folder!r} is a file, but a folder is expected there') from None


def is_image(name: str) -> bool:
    """Returns True if the name has the suffix of an image."""
    return name.lower().endswith(SUFFIXES)


def is_readable(path: str) -> bool:
    """Returns True for a regular file or a broken link, which is reported when it is read; False for a pipe."""
    return os.path.isfile(path) or not os.path.exists(path)


def identity(folder: str) -> Hashable:
    """Returns a value that identifies a folder: its inode, or its resolved path on file systems without inodes."""
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def folders(folder: str) -> list[str]:
    """Returns the names of the folders in a folder; none if it is unreadable."""
    try:
        return [entry.name for entry in entries(folder) if entry.is_dir()]
    except OSError:
        return []


def has_image(folder: str, levels: int = MAX_DEPTH) -> bool:
    """Returns True if the folder, or one of the first `MAX_SEARCHED` folders below it, holds an image."""
    try:
        present = entries(folder)
    except OSError:
        return False
    if any(is_image(entry.name) for entry in present):
        return True
    return levels > 1 and any(has_image(entry.path, levels - 1) for entry in present[:MAX_SEARCHED] if entry.is_dir())


def hidden_folders(folder: str) -> list[str]:
    """Returns the names of the hidden folders that hold images."""
    with os.scandir(folder) as scanned:
        return sorted(entry.name for entry in scanned
                      if entry.name.startswith('.') and entry.is_dir() and has_image(entry.path))


def summarize(names: Sequence[str], one: str, many: str = '') -> str:
    """Returns the number and the first five names: '2 classes (yak, zebra)'."""
    if not names:
        return f'no {many or one + "s"}'
    shown = ', '.join(map(in_one_line, names[:5])) + (', ...' if len(names) > 5 else '')
    plural = many or (one + 'es' if one.endswith('s') else one + 's')
    return f'{len(names)} {one if len(names) == 1 else plural} ({shown})'
