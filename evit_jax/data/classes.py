"""Names of classes that a person can read.

Source: `imagenet_classes.txt` holds the synsets of ImageNet-1k in the order of their labels, each with one short name;
the names are the well-known list that tells all thousand apart (a crane that is a bird from one that lifts).
"""

import functools
import pathlib
from collections.abc import Sequence


def names_of(count: int) -> tuple[str, ...]:
    """The names of so many classes of which nothing else is known: those of ImageNet-1k, else their numbers."""
    names = tuple(_imagenet().values())
    return names if count == len(names) else tuple(map(str, range(count)))


def readable(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with words for ImageNet's synsets (n01440764) and for the bare numbers of its 1,000 classes."""
    if all(name == str(label) for label, name in enumerate(names)):
        return names_of(len(names))
    return tuple(_imagenet().get(name, name) for name in names)


@functools.cache
def _imagenet() -> dict[str, str]:
    """From synset to name, in the order of the labels."""
    text = pathlib.Path(__file__).with_name('imagenet_classes.txt').read_text(encoding='utf-8')
    return dict(line.split(' ', 1) for line in text.splitlines())
