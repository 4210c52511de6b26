"""Things that are asked for by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar('T')


def get_by_name(kind: str, name: str, known: Mapping[str, T]) -> T:
    """The one of that name.

    Args:
      kind: what they are, for the message.

    Raises:
      ValueError: there is none; names the nearest.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f'did you mean {near[0]}?' if near else f'there are {", ".join(known)}'
        raise ValueError(f'unknown {kind} {name!r}: {hint}')
    return known[name]
