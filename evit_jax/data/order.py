"""Which examples come in which step, and the random streams of the input: functions of the seed and of numbers."""

import functools
from collections.abc import Iterator

import numpy as np

from evit_jax.data.sources import Source

ORDER, SAMPLE, REPLACEMENT = range(3)  # what a random stream is for
_SELECTED = 256                        # with repeats, an epoch's samples are a multiple of this, as in the reference


def epoch_samples(examples: int, repeats: int = 1) -> int:
    """Samples of an epoch. With repeats an epoch is no longer than without: it visits so many images fewer."""
    return examples if repeats == 1 else examples // _SELECTED * _SELECTED or examples


def train_steps(examples: int, batch_size: int, epochs: int, repeats: int = 1, offset: int = 0) -> int:
    """Full global batches in so many epochs; a batch may straddle two epochs, the rest is dropped.

    Args:
      offset: samples by which step s begins after sample s * batch_size; not 0 after a change of batch size.
    """
    return (epoch_samples(examples, repeats) * epochs - offset) // batch_size


def samples(begin: int, count: int, examples: int, *, seed: int, repeats: int) -> Iterator[tuple[int, int, int]]:
    """(epoch, example, copy) of so many samples in a row, of all that a training shows."""
    per_epoch = epoch_samples(examples, repeats)
    for position in range(begin, begin + count):
        epoch, place = divmod(position, per_epoch)
        place, copy = divmod(place, repeats)
        yield epoch, int(_permutation(examples, seed, epoch)[place]), copy


def batch_ids(source: Source, step: int, *, batch_size: int, seed: int, repeats: int = 1,
              offset: int = 0) -> list[str]:
    """Ids of the examples in the global batch of a training step, each once.

    One that cannot be read, in whose place another was shown, is called by its number.

    Args:
      offset: see `train_steps`.
    """
    ids = []
    drawn = samples(step * batch_size + offset, batch_size, len(source), seed=seed, repeats=repeats)
    for index in dict.fromkeys(index for _, index, _ in drawn):
        try:
            ids.append(source[index]['id'])
        except (ValueError, OSError):
            ids.append(f'example {index}, unreadable')
    return ids


def stream(purpose: int, seed: int, *key: int) -> np.random.Generator:
    """The random stream of one purpose and key; the seed may be negative."""
    return np.random.default_rng((purpose, seed % 2**64, *key))


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs; 5 MB each for ImageNet
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    return stream(ORDER, seed, epoch).permutation(np.arange(examples, dtype=np.int32))
