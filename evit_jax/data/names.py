"""Names of files, folders and classes: printed on one line, and compared as a reader compares them."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_ESCAPED = re.compile('[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')


def printable(name: str) -> str:
    r"""The name on one line: line ends, control characters and bytes that are no UTF-8 become \n, \x1b, \xe9."""
    return _ESCAPED.sub(_escape, name)


def displayed(name: str) -> str:
    """The name of a class folder as it is displayed, recorded and compared: printable, in Unicode's composed form.

    File systems and archives disagree about the form: 'é' is one character on Linux, and often two on a Mac.
    """
    return unicodedata.normalize('NFC', printable(name))


def few(names: Sequence[str], one: str, many: str = '') -> str:
    """'2 classes (yak, zebra)'; names the first five."""
    if not names:
        return f'no {many or one + "s"}'
    shown = ', '.join(map(printable, names[:5])) + (', ...' if len(names) > 5 else '')
    plural = many or (one + 'es' if one.endswith('s') else one + 's')
    return f'{len(names)} {one if len(names) == 1 else plural} ({shown})'


def lookalikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in case, in spaces, or in characters that cannot be told apart."""
    first: dict[str, str] = {}
    return [(first[key], name) for name in names if first.setdefault(key := lookalike_key(name), name) != name]


def lookalike_key(name: str) -> str:
    """A text that lookalikes share."""
    visible = ''.join(letter for letter in name if unicodedata.category(letter) != 'Cf')  # no byte order mark
    return ''.join(unicodedata.normalize('NFKC', visible).casefold().split())


def _escape(match: re.Match) -> str:
    code = ord(match[0])
    if 0xdc80 <= code <= 0xdcff:  # Python's stand-in for a byte that is no UTF-8
        return f'\\x{code - 0xdc00:02x}'
    return match[0].encode('unicode_escape').decode() if code < 0x80 else f'\\u{code:04x}'
