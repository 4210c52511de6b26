"""From the words of a command line to image files."""

import glob
import os
from collections.abc import Iterable

from absl import logging

from evit_jax.data.sources import folder_entries
from evit_jax.data.transforms.decode import SUFFIXES


def find_images(words: str | Iterable[str], lines: Iterable[str] = ()) -> list[str]:
    """The files that the words mean, in the words' order and by name within one.

    A folder means the images in it and below it, without hidden ones; a pattern ('shots/*.jpg', '**' for folders below)
    what it matches; '-' the `lines`. Any other word is a file, whatever its suffix and whether it is there or not. A
    str is one word.

    Raises:
      ValueError: nothing is found for a word.
      OSError: a folder cannot be read.
    """
    found = []
    for word in [words] if isinstance(words, str) else words:
        if word == '-':
            mine = [name for name in (line.rstrip('\r\n') for line in lines) if name]
        else:
            mine = _meant_by(os.path.expanduser(word))
        if not mine:
            raise ValueError('no file is named on standard input' if word == '-' else
                             f'no image is in {word} ({", ".join(SUFFIXES)})')
        found += mine
    return found


def _meant_by(word):
    if os.path.isdir(word):
        return _inside(word)
    if os.path.lexists(word) or not glob.has_magic(word):
        return [word]
    matches = sorted(glob.glob(word, recursive=True))
    if not matches:
        raise ValueError(f'no file matches {word}')
    found = [file for match in matches for file in (_inside(match) if os.path.isdir(match) else [match])]
    return [file for file in dict.fromkeys(found) if _is_image(file)]  # '**' finds a file twice


def _inside(folder):
    """Images at and below a folder; one that links lead to again is not entered again."""
    found, entered = [], set()

    def refuse(error):
        raise error

    for here, below, files in os.walk(folder, onerror=refuse, followlinks=True):
        folder = folder_entries.identity(here)
        if folder in entered:
            below.clear()
            continue
        entered.add(folder)
        below[:] = sorted(name for name in below if not name.startswith('.'))
        found += [file for name in sorted(files) if not name.startswith('.')
                  and _is_image(file := os.path.join(here, name))]
    return found


def _is_image(path):
    """True for a file with the suffix of an image; a pipe is left out, to read it may wait for ever."""
    if not folder_entries.is_image(path):
        return False
    if not folder_entries.is_readable(path):
        logging.warning('%r is no regular file and is left out', path)
        return False
    return True
