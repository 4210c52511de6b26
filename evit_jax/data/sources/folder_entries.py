"""Lists the entries of image folders. Hidden entries are skipped, and links are followed."""

import os
from collections.abc import Hashable, Sequence

from evit_jax.data.names import in_one_line
from evit_jax.data.transforms.decode import SUFFIXES

MAX_SEARCHED = 50  # maximum number of subfolders that are searched for a hint in an error message
MAX_DEPTH = 4      # maximum depth of that search
_IGNORED = ('__MACOSX', '@eaDir', '$RECYCLE.BIN', 'lost+found')  # folders created by archives and file systems


def entries(folder: str) -> list[os.DirEntry]:
    """Returns the entries of a folder that are not hidden, sorted by name.

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
    """Returns True for a regular file and for a broken link, False for a pipe. Reading the link reports an error."""
    return os.path.isfile(path) or not os.path.exists(path)


def identity(folder: str) -> Hashable:
    """Returns a value that identifies a folder: its inode, or its resolved path on file systems without inodes."""
    status = os.stat(folder)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(folder)


def folders(folder: str) -> list[str]:
    """Returns the names of the subfolders of a folder; [] if the folder is unreadable."""
    try:
        return [entry.name for entry in entries(folder) if entry.is_dir()]
    except OSError:
        return []


def has_image(folder: str, levels: int = MAX_DEPTH) -> bool:
    """Returns True if the folder holds an image, or one of its first `MAX_SEARCHED` entries does, recursively."""
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
    """Formats the number of names and the first five of them: '2 classes (yak, zebra)'."""
    if not names:
        return f'no {many or one + "s"}'
    shown = ', '.join(map(in_one_line, names[:5])) + (', ...' if len(names) > 5 else '')
    plural = many or (one + 'es' if one.endswith('s') else one + 's')
    return f'{len(names)} {one if len(names) == 1 else plural} ({shown})'
