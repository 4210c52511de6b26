"""The order of the examples and the random streams of the input. Both are functions of the seed and of indices."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from evit_jax.data.sources import Source

ORDER, SAMPLE, REPLACEMENT = range(3)  # purposes of random streams
_MULTIPLE = 256                        # if repeats > 1, an epoch has a multiple of 256 samples, as in DeiT


class SampleOrder(NamedTuple):
    """Settings that determine which samples are in a training batch."""

    batch_size: int   # size of the global batch
    epochs: int
    seed: int         # seed of order and augmentation
    repeats: int = 1  # consecutive copies of each image, augmented independently (repeated augmentation)
    offset: int = 0   # step s begins at sample s * batch_size + offset; see `positions`


def epoch_samples(examples: int, repeats: int = 1) -> int:
    """Returns the number of samples in an epoch. Repeats do not increase it; they reduce the number of images."""
    return examples if repeats == 1 else examples // _MULTIPLE * _MULTIPLE or examples


def train_steps(examples: int, batch_size: int, epochs: int, repeats: int = 1, offset: int = 0) -> int:
    """Returns the number of full global batches in `epochs`. A batch may span two epochs; the remainder is dropped.

    Args:
      offset: see `SampleOrder`; nonzero after a change of batch size.
    """
    return (epoch_samples(examples, repeats) * epochs - offset) // batch_size


def samples(begin: int, count: int, examples: int, *, seed: int, repeats: int) -> Iterator[tuple[int, int, int]]:
    """Yields (epoch, example, copy) for `count` consecutive training samples. The first one is sample `begin`."""
    per_epoch = epoch_samples(examples, repeats)
    for position in range(begin, begin + count):
        epoch, within = divmod(position, per_epoch)
        within, copy = divmod(within, repeats)
        yield epoch, int(_permutation(examples, seed, epoch)[within]), copy


def batch_ids(source: Source, step: int, *, batch_size: int, seed: int, repeats: int = 1,
              offset: int = 0) -> list[str]:
    """Returns the ids of the examples in the global batch of a training step, without duplicates.

    An unreadable example, which is replaced in the batch, is listed as 'example NUMBER, unreadable'.

    Args:
      offset: see `SampleOrder`.
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
    """Returns the random generator of a purpose and key. The seed may be negative."""
    return np.random.default_rng((purpose, seed % 2**64, *key))


@functools.lru_cache(maxsize=2)  # a batch may span two epochs; 5 MB each for ImageNet
def _permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in an epoch."""
    return stream(ORDER, seed, epoch).permutation(np.arange(examples, dtype=np.int32))
