"""Finds the image files that a command line names: files, folders, patterns, or standard input."""

import glob
import os
from collections.abc import Iterable

from absl import logging

from evit_jax.data.sources import folder_entries
from evit_jax.data.transforms.decode import SUFFIXES


def find_images(words: str | Iterable[str], lines: Iterable[str] = ()) -> list[str]:
    """Finds the image files for the words of a command line, in the order of the words. A str is one word.

    A folder selects the images in it and in its subfolders, except hidden ones. A pattern ('shots/*.jpg', with '**' for
    subfolders) selects its matches. The results of one word are sorted by name. '-' selects the names in `lines`. Any
    other word is the path of a file; the file need not exist, and its suffix is not checked.

    Raises:
      ValueError: a word selects no image.
      OSError: a folder cannot be read.
    """
    paths = []
    for word in [words] if isinstance(words, str) else words:
        if word == '-':
            files = [name for name in (line.rstrip('\r\n') for line in lines) if name]
        else:
            files = _files_of(os.path.expanduser(word))
        if not files:
            raise ValueError('no file is named on standard input' if word == '-' else
                             f'no image is in {word} ({", ".join(SUFFIXES)})')
        paths += files
    return paths


def _files_of(word):
    if os.path.isdir(word):
        return _images_below(word)
    if os.path.lexists(word) or not glob.has_magic(word):
        return [word]
    matches = sorted(glob.glob(word, recursive=True))
    if not matches:
        raise ValueError(f'no file matches {word}')
    files = [file for match in matches for file in (_images_below(match) if os.path.isdir(match) else [match])]
    return [file for file in dict.fromkeys(files) if _is_image(file)]  # '**' finds a file twice


def _images_below(folder):
    """Returns the images in a folder and its subfolders. A folder that several links lead to is visited once."""
    files, entered = [], set()

    def refuse(error):
        raise error

    for path, subfolders, names in os.walk(folder, onerror=refuse, followlinks=True):
        identity = folder_entries.identity(path)
        if identity in entered:
            subfolders.clear()
            continue
        entered.add(identity)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith('.'))
        files += [file for name in sorted(names) if not name.startswith('.')
                  and _is_image(file := os.path.join(path, name))]
    return files


def _is_image(path):
    """Returns True for a regular file with the suffix of an image format. Reading a pipe could block forever."""
    if not folder_entries.is_image(path):
        return False
    if not folder_entries.is_readable(path):
        logging.warning('%r is no regular file and is left out', path)
        return False
    return True
