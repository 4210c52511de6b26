"""Names and slices of splits as tfds writes them: 'train', 'train[:90%]', 'test[:1000]', 'train+test'; and 'auto'."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

import tensorflow_datasets as tfds

AUTO = 'auto'  # the split to evaluate on
HELD_OUT = ('validation', 'val', 'test')  # 'auto' is the first of these that the data have
_WITHOUT = {'train': 'train[:90%]', AUTO: 'train[90%:]'}  # where they have none
_WHOLE = '[:100%]'


class Part(NamedTuple):
    """Examples `start` to `stop` of a split."""
    split: str
    start: int
    stop: int


def resolve(split: str, have: Collection[str]) -> str:
    """The split that 'train' or 'auto' means for data with the splits `have`; other names and slices pass as they are.

    'auto' is the split to evaluate on: 'validation' (or 'val') before 'test', which often has no labels. Without these
    it is the last tenth of 'train', and 'train' is the rest. 'train[:100%]' is always all of 'train'.
    """
    held_out = [name for name in HELD_OUT if name in have]
    if not held_out:
        return _WITHOUT.get(split, split)
    return held_out[0] if split == AUTO else split


def to_record(split: str) -> str:
    """The text that a run's config keeps for a split: 'test[:100%]' for 'test'.

    Until there was 'auto', 'test' had its meaning: a bare 'test' in a config that was kept is from then.
    """
    return f'{split}{_WHOLE}' if split == 'test' else split


def from_record(split: str) -> str:
    """The split that a kept config names, see `to_record`."""
    return AUTO if split == 'test' else split


def title(split: str) -> str:
    """The split for messages: a whole split by its name alone."""
    return split.removesuffix(_WHOLE)


def base_names(split: str) -> list[str]:
    """The splits that a text names, without their slices; looks nothing up."""
    return [part.partition('[')[0].strip() for part in split.split('+')]


def names(split: str, have: Collection[str]) -> list[str]:
    """The splits of which `split` has slices.

    Raises:
      ValueError: one of them is not there.
    """
    found = base_names(split)
    for name in found:
        if name not in have:
            raise ValueError(f'no split {name!r} (there are {", ".join(have) or "none"})')
    return found


def overlap(first: Iterable[Part], second: Iterable[Part]) -> int:
    """Examples that are in both."""
    return sum(max(0, min(a.stop, b.stop) - max(a.start, b.start))
               for a in first for b in second if a.split == b.split)


def parts(split: str, sizes: Mapping[str, int]) -> list[Part]:
    """The parts of which `split` consists, in order.

    Args:
      sizes: examples of each split that `split` names; more do no harm.

    Raises:
      ValueError: no such split, it is not written as tfds does, or it holds nothing.
    """
    names(split, sizes)
    infos = {name: tfds.core.SplitInfo(name=name, shard_lengths=[size], num_bytes=0) for name, size in sizes.items()}
    try:
        found = [Part(at.splitname, at.from_ or 0, sizes[at.splitname] if at.to is None else at.to)
                 for at in tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)]
    except (ValueError, AssertionError) as error:
        raise ValueError(f"split {split!r}: {str(error).splitlines()[-1].rstrip('.')}; write it like 'train', "
                         "'train[:90%]' or 'train[1000:]'") from error
    if not any(part.stop > part.start for part in found):
        has = ', '.join(f'{size:,} in {name!r}' for name, size in sizes.items())
        raise ValueError(f'split {split!r} holds no examples (there are {has})')
    return found
