"""Names of classes that a person can read.

Source: `imagenet_classes.txt` holds the synsets of ImageNet-1k in the order of their labels, each with one short name;
the names are the well-known list that tells all thousand apart (a crane that is a bird from one that lifts).
"""

import collections
import functools
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence

from absl import logging

from evit_jax.data.names import in_one_line


def default_class_names(count: int) -> tuple[str, ...]:
    """Names for weights that were recorded without: those of ImageNet-1k for 1,000 classes, else their numbers."""
    names = tuple(_imagenet().values())
    if count != len(names):
        return tuple(map(str, range(count)))
    logging.info('the weights have no class names: their %d classes are assumed to be those of ImageNet-1k', count)
    return names


def readable_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names as displayed, with words for ImageNet's synsets (n01440764) unless another class has the same name."""
    found = tuple(_imagenet().get(name, display_name(name)) for name in names)
    counts = collections.Counter(found)
    return tuple(name if counts[name] == 1 else display_name(old) for name, old in zip(found, names))


def display_name(name: str) -> str:
    """The name of a class folder as it is displayed, recorded and compared: in one line, in Unicode's composed form.

    File systems and archives disagree about the form: 'é' is one character on Linux, and often two on a Mac.
    """
    return unicodedata.normalize('NFC', in_one_line(name))


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Compares two lists of class names; the bare numbers of 1,000 classes count as ImageNet's names."""
    numbers, imagenet = (tuple(names) for names in (map(str, range(len(_imagenet()))), _imagenet().values()))
    return tuple(one) == tuple(other) or {tuple(one), tuple(other)} == {numbers, imagenet}


def lookalikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ only in case, in spaces, or in characters that cannot be told apart."""
    first: dict[str, str] = {}
    return [(first[key], name) for name in names if first.setdefault(key := lookalike_key(name), name) != name]


def lookalike_key(name: str) -> str:
    """A text that lookalikes share."""
    visible = ''.join(letter for letter in name if unicodedata.category(letter) != 'Cf')  # no byte order mark
    return ''.join(unicodedata.normalize('NFKC', visible).casefold().split())


@functools.cache
def _imagenet() -> dict[str, str]:
    """From synset to name, in the order of the labels."""
    text = pathlib.Path(__file__).with_name('imagenet_classes.txt').read_text(encoding='utf-8')
    return dict(line.split(' ', 1) for line in text.splitlines())
