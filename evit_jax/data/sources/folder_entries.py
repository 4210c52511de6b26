"""The entries of folders with images: hidden ones are left out, links are followed."""

import os
from collections.abc import Hashable, Sequence

from evit_jax.data.names import in_one_line
from evit_jax.data.transforms.decode import SUFFIXES

LOOKED_AT = 50  # folders below one that are looked at for a hint
LEVELS = 4      # depth of folders that is looked into
_NOT_DATA = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found')  # folders that archives and disks add; left out


def entries(folder: str) -> list[os.DirEntry]:
    """The entries of a folder by name, without hidden ones.

    Raises:
      OSError: there is no such folder, or it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith('.') and entry.name not in _NOT_DATA),
                          key=lambda entry: entry.name)
    except FileNotFoundError:
        raise FileNotFoundError(f'there is no folder {folder!r}') from None
    except NotADirectoryError:
        raise NotADirectoryError(f'{folder!r} is a file, but a folder is expected there') from None


def is_image(name: str) -> bool:
    """True if the suffix is that of an image."""
    return name.lower().endswith(SUFFIXES)


def is_readable(path: str) -> bool:
    """True for a regular file, and for a link that leads nowhere, which fails when it is read; False for a pipe."""
    return os.path.isfile(path) or not os.path.exists(path)


def identity(folder: str) -> Hashable:
    """The same value for two paths of one folder: the inode, or the path without links where there are no inodes."""
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def folders(folder: str) -> list[str]:
    """Names of the first folders in a folder; none where it cannot be read."""
    try:
        return [entry.name for entry in entries(folder) if entry.is_dir()]
    except OSError:
        return []


def has_image(folder: str, levels: int = LEVELS) -> bool:
    """True if an image is in a folder, or in one of the first folders below it."""
    try:
        found = entries(folder)
    except OSError:
        return False
    if any(is_image(entry.name) for entry in found):
        return True
    return levels > 1 and any(has_image(entry.path, levels - 1) for entry in found[:LOOKED_AT] if entry.is_dir())


def hidden_folders(folder: str) -> list[str]:
    """Names of the hidden folders that hold images."""
    with os.scandir(folder) as found:
        return sorted(entry.name for entry in found
                      if entry.name.startswith('.') and entry.is_dir() and has_image(entry.path))


def few(names: Sequence[str], one: str, many: str = '') -> str:
    """'2 classes (yak, zebra)'; names the first five."""
    if not names:
        return f'no {many or one + "s"}'
    shown = ', '.join(map(in_one_line, names[:5])) + (', ...' if len(names) > 5 else '')
    plural = many or (one + 'es' if one.endswith('s') else one + 's')
    return f'{len(names)} {one if len(names) == 1 else plural} ({shown})'
