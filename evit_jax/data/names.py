"""Makes names of files and classes safe for logs, JSON and output file names."""

import base64
import os
import pathlib
import unicodedata
from collections.abc import Iterable

_UNSAFE = {'Cc', 'Cs', 'Zl', 'Zp'}  # Unicode categories: controls, surrogates, line and paragraph separators
_BIDI = set('\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069')  # characters that change the text direction
_MAX_BYTES = 255  # limit on a file name's length if the system reports none


def valid_text(name: str) -> str:
    r"""Returns the name as valid Unicode text: bytes that are not UTF-8 become escapes such as \xff."""
    try:
        return name.encode('utf-8', 'surrogateescape').decode('utf-8', 'backslashreplace')
    except UnicodeEncodeError:  # surrogates that encode no byte
        return name.encode('utf-8', 'backslashreplace').decode()


def in_one_line(name: str) -> str:
    r"""Returns the name as one line of text: controls and line ends become escapes such as \n and \x1b."""
    return ''.join(letter.encode('unicode_escape').decode() if letter in _BIDI
                   or unicodedata.category(letter) in _UNSAFE else letter for letter in valid_text(name))


def in_json(name: str) -> dict[str, str]:
    """Returns the fields of a JSON object that hold the exact name of an image.

    Returns:
      {'image': name}. If the name is not UTF-8, 'image' contains escapes, and 'image_base64' has its exact bytes.
    """
    text = valid_text(name)
    return {'image': text} if text == name else {
        'image': text, 'image_base64': base64.b64encode(os.fsencode(name)).decode()}


class FileNames:
    """Generates file names for one output folder. They are distinct on every file system, also without regard to case.

    Args:
      folder: folder of the output files.
      taken: paths of files that must not be overwritten.
    """

    def __init__(self, folder: str | os.PathLike, taken: Iterable[str] = ()):
        try:
            self._max_bytes = os.pathconf(folder, 'PC_NAME_MAX')
        except (OSError, ValueError, AttributeError):
            self._max_bytes = _MAX_BYTES
        folder = os.path.realpath(folder)
        self._taken = {_key(os.path.basename(path)) for path in taken
                       if os.path.realpath(os.path.dirname(os.path.abspath(path))) == folder}

    def of(self, path: str, suffix: str) -> str:
        """Returns a new file name: the stem of the path followed by `suffix`. A stem that is too long is cut."""
        stem = ''.join('_' if unicodedata.category(letter) in _UNSAFE else letter
                       for letter in pathlib.PurePath(path).stem or 'image')
        begin, _, end = suffix.rpartition('.')
        number = 1
        while True:
            tail = f'{begin}{f"_{number}" if number > 1 else ""}.{end}'
            available = self._max_bytes - len(tail.encode())
            name = stem.encode()[:available].decode(errors='ignore') + tail
            if _key(name) not in self._taken:
                self._taken.add(_key(name))
                return name
            number += 1


def _key(name: str) -> str:
    """Returns a key that ignores case and Unicode form, because some file systems ignore them."""
    return unicodedata.normalize('NFC', name).casefold()
