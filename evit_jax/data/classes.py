"""Human-readable class names.

The file `imagenet_classes.txt` lists the synsets of ImageNet-1k in the order of their labels. Each has a short, unique
name: the two classes called crane, a bird and a machine, have different names here.
"""

import collections
import functools
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

from absl import logging

from evit_jax.data.names import in_one_line


def default_class_names(count: int) -> tuple[str, ...]:
    """Returns class names for weights that store none: ImageNet-1k's for 1,000 classes, otherwise numbers."""
    names = tuple(_imagenet().values())
    if count != len(names):
        return tuple(map(str, range(count)))
    logging.info('the weights have no class names: their %d classes are assumed to be those of ImageNet-1k', count)
    return names


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """Returns display names. A synset (n01440764) becomes words unless another class would have the same name."""
    readable = tuple(_imagenet().get(name, display_name(name)) for name in names)
    counts = collections.Counter(readable)
    return tuple(name if counts[name] == 1 else display_name(old) for name, old in zip(readable, names))


def display_name(name: str) -> str:
    """Returns the canonical form of a class folder's name: one line, in composed Unicode (NFC).

    File systems and archives use different Unicode forms: 'é' is one character on Linux, and often two on macOS.
    """
    return unicodedata.normalize('NFC', in_one_line(name))


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Returns True if both lists name the same classes. The numbers 0 to 999 are equal to the names of ImageNet."""
    numbers, imagenet = tuple(map(str, range(len(_imagenet())))), tuple(_imagenet().values())
    return tuple(one) == tuple(other) or {tuple(one), tuple(other)} == {numbers, imagenet}


def lookalikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns the pairs of names that look alike: they differ in case, spaces, invisible or equivalent characters."""
    first: dict[str, str] = {}
    return [(first[key], name) for name in names if first.setdefault(key := lookalike_key(name), name) != name]


def lookalike_key(name: str) -> str:
    """Returns a key that is equal for names that look alike."""
    # Characters of category Cf, such as a byte order mark, are invisible.
    visible = ''.join(letter for letter in name if unicodedata.category(letter) != 'Cf')
    return ''.join(unicodedata.normalize('NFKC', visible).casefold().split())


@functools.cache
def _imagenet() -> dict[str, str]:
    """Returns a dict from synset to name, in the order of the labels."""
    text = pathlib.Path(__file__).with_name('imagenet_classes.txt').read_text(encoding='utf-8')
    return dict(line.split(' ', 1) for line in text.splitlines())
