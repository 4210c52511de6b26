"""Names that come from outside, as lines of text, in JSON, and in the names of files that are written."""

import base64
import os
import pathlib
import unicodedata
from collections.abc import Iterable

_UNSAFE = {'Cc', 'Cs', 'Zl', 'Zp'}  # categories of Unicode: controls, half characters, ends of lines and paragraphs
_BIDI = set('\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')  # they change the order in which a line is shown
_LONGEST = 255  # bytes of a file's name, where the system does not tell


def valid_text(name: str) -> str:
    r"""The name as text that can be encoded: its bytes that are not UTF-8 become \xff and the like."""
    try:
        return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    except UnicodeEncodeError:  # halves of characters that stand for no bytes
        return name.encode('utf-8', 'backslashreplace').decode()


def in_one_line(name: str) -> str:
    r"""The name as text of one line: controls and line ends become \n, \x1b and the like."""
    return ''.join(letter.encode('unicode_escape').decode() if letter in _BIDI
                   or unicodedata.category(letter) in _UNSAFE else letter for letter in valid_text(name))


def in_json(name: str) -> dict[str, str]:
    """The fields of a JSON object that give an image's exact name.

    Returns:
      `image`, the name; where it is not UTF-8, with escapes, and `image_base64` has its bytes.
    """
    text = valid_text(name)
    return {'image': text} if text == name else {
        'image': text, 'image_base64': base64.b64encode(os.fsencode(name)).decode()}


class FileNames:
    """Names for files in one folder that are called after something else; no two are the same, on any file system.

    Args:
      folder: that they are in.
      taken: paths of files that must not be replaced.
    """

    def __init__(self, folder: str | os.PathLike, taken: Iterable[str] = ()):
        try:
            self._longest = os.pathconf(folder, 'PC_NAME_MAX')
        except (OSError, ValueError, AttributeError):
            self._longest = _LONGEST
        here = os.path.realpath(folder)
        self._taken = {_key(os.path.basename(path)) for path in taken
                       if os.path.realpath(os.path.dirname(os.path.abspath(path))) == here}

    def of(self, path: str, suffix: str) -> str:
        """A new name: the path's own without its folders and its suffix, then `suffix`; cut where it is too long."""
        stem = ''.join('_' if unicodedata.category(letter) in _UNSAFE else letter
                       for letter in pathlib.PurePath(path).stem or 'image')
        begin, _, end = suffix.rpartition('.')
        number = 1
        while True:
            tail = f'{begin}{f"_{number}" if number > 1 else ""}.{end}'
            room = self._longest - len(tail.encode())
            name = stem.encode()[:room].decode(errors='ignore') + tail
            if _key(name) not in self._taken:
                self._taken.add(_key(name))
                return name
            number += 1


def _key(name: str) -> str:
    """The same for names that some file system takes for one: by case, or by how accents are written."""
    return unicodedata.normalize('NFC', name).casefold()
