"""Finds objects by name, and the nearest known name for a misspelt name."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar('T')


def nearest_name(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Returns the most similar known name, or None if no name is similar.

    Args:
      cutoff: minimal similarity, from 0 (different) to 1 (equal).
    """
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def get_by_name(kind: str, name: str, known: Mapping[str, T]) -> T:
    """Returns the object with a name.

    Args:
      kind: kind of object for the error message, such as 'reducer'.
      name: the requested name.
      known: objects by name.

    Raises:
      ValueError: no object has this name. The message gives the nearest name, or all names.
    """
    if name not in known:
        nearest = nearest_name(name, known)
        hint = f'did you mean {nearest}?' if nearest else f'there are {", ".join(known)}'
        raise ValueError(f'unknown {kind} {name!r}: {hint}')
    return known[name]
