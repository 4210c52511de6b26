"""Parses split names in tfds notation ('train', 'train[:90%]', 'test[:1000]', 'train+test'), and 'auto'."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

AUTO = 'auto'  # selects the split to evaluate on; see `resolve`
HELD_OUT = ('validation', 'val', 'test')  # 'auto' is the first of these that exists
_WITHOUT_HELD_OUT = {'train': 'train[:90%]', AUTO: 'train[90%:]'}  # used if the data have no held-out split
_WHOLE = '[:100%]'


class SplitSlice(NamedTuple):
    """Examples `start` to `stop` of a split."""
    split: str
    start: int
    stop: int


def resolve(split: str, available: Collection[str]) -> str:
    """Resolves 'train' and 'auto' for data with the available splits. Other names and slices are returned unchanged.

    'auto' is the split to evaluate on. 'validation' and 'val' precede 'test', because 'test' often has no labels. If no
    such split exists, 'auto' is the last tenth of 'train', and 'train' is the rest. 'train[:100%]' always means all
    training examples.
    """
    held_out = [name for name in HELD_OUT if name in available]
    if not held_out:
        return _WITHOUT_HELD_OUT.get(split, split)
    return held_out[0] if split == AUTO else split


def to_record(split: str) -> str:
    """Returns the text that a recorded config stores for a split: 'test[:100%]' for 'test'.

    Older configs recorded a bare 'test' for the split that is now called 'auto'. The two must remain distinct.
    """
    return f'{split}{_WHOLE}' if split == 'test' else split


def from_record(split: str) -> str:
    """Returns the split for the text in a recorded config; the inverse of `to_record`."""
    return AUTO if split == 'test' else split


def title(split: str) -> str:
    """Returns the split as shown in messages: 'test' for 'test[:100%]'."""
    return split.removesuffix(_WHOLE)


def base_names(split: str) -> list[str]:
    """Returns the names of the splits in the text, without slices. It does not check that they exist."""
    return [each.partition('[')[0].strip() for each in split.split('+')]


def names(split: str, available: Collection[str]) -> list[str]:
    """Returns the names of the splits in the text, without slices.

    Raises:
      ValueError: a named split is not available.
    """
    requested = base_names(split)
    for name in requested:
        if name not in available:
            raise ValueError(f'no split {name!r} (there are {", ".join(available) or "none"})')
    return requested


def overlap(first: Iterable[SplitSlice], second: Iterable[SplitSlice]) -> int:
    """Returns the number of examples that belong to both lists of slices."""
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start))
               for a in first for b in second if a.split == b.split)


def slices(split: str, sizes: Mapping[str, int]) -> list[SplitSlice]:
    """Parses a split into slices, in order.

    Args:
      sizes: numbers of examples of the available splits.

    Raises:
      ValueError: unknown split, invalid notation, or no examples.
    """
    names(split, sizes)
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
    try:
        result = [SplitSlice(at.splitname, at.from_ or 0, sizes[at.splitname] if at.to is None else at.to)
                  for at in tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)]
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r}: {str(error).splitlines()[-1].rstrip('.')}; write it like 'train', "
                         "'train[:90%]' or 'train[1000:]'") from error
    if not any(each.stop > each.start for each in result):
        counts = ', '.join(f'{size:,} in {name!r}' for name, size in sizes.items())
        raise ValueError(f'split {split!r} holds no examples (there are {counts})')
    return result
