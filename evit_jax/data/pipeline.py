"""From a source to batches, with Grain. What is in a batch is a function of (seed, step) alone.

Neither the number of processes, nor the number of workers, nor where a run was interrupted changes the global batch of
a step. Steps, not iterator states, are what a checkpoint keeps.
"""

import math
from collections.abc import Callable

import grain.python as grain
import numpy as np
from absl import flags

from evit_jax.data import transforms
from evit_jax.data.decode import decode, decode_mask
from evit_jax.data.sources import Source

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [S, S, 3] to the same
_BATCHES_AHEAD = 4  # made in the background while a step runs


def train_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Full global batches in `epochs` passes over the data; a batch may straddle two passes, the rest is dropped."""
    return examples * epochs // batch_size


def train_batches(source: Source, *, batch_size: int, epochs: int, seed: int, image_size: int,
                  augment: Augment | None = None, start_step: int = 0, num_workers: int = 0,
                  process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """This process's share of the shuffled batches from `start_step` to the end of the last epoch.

    Args:
      source: every example comes once per epoch, each epoch in another order.
      batch_size: of the global batch; this process yields batch_size / process_count examples of it.
      seed: of order and augmentation.
      augment: applied after decoding and resizing; its Generator is a function of (seed, position).
      start_step: the first batch yielded is the one that an uninterrupted run has at this step.
      num_workers: processes that decode; with 0 a thread does.

    Returns:
      An iterator of {image: uint8 [b, S, S, 3], label: int32 [b]}. Call its `close()` when done with it.

    Raises:
      ValueError: sizes that do not fit together.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if len(source) * epochs < batch_size:
        raise ValueError(f'batch_size={batch_size} is larger than the data: {len(source)} examples in {epochs} '
                         f'epochs; lower the batch or add epochs')
    steps = train_steps(len(source), batch_size, epochs)
    if not 0 <= start_step <= steps:
        raise ValueError(f'start_step={start_step} is outside [0, {steps}], the steps of {epochs} epochs; '
                         f'has the batch size or the number of epochs changed since the run began?')
    # Over indices rather than over the source: a source node of Grain costs 0.05 ms an example, in bookkeeping.
    order = grain.MapDataset.range(len(source)).seed(seed % 2**32).shuffle().repeat(epochs)
    examples = order.random_map(_MakeTrain(source, image_size, augment))
    # One slice for all processes first: else their numbers of batches could differ, and the last step would hang.
    mine = examples[start_step * batch_size:steps * batch_size][process_index::process_count]
    return iter(_in_background(mine.batch(local, drop_remainder=True), num_workers))


def eval_batches(source: Source, *, batch_size: int, image_size: int, process_index: int = 0, process_count: int = 1,
                 num_workers: int = 0) -> grain.DatasetIterator:
    """This process's share of the batches in which every example comes once, in the source's order.

    Returns:
      An iterator of {image: uint8 [b, S, S, 3], label: int32 [b], index: int32 [b], weight: float32 [b]}, and mask:
      bool [b, S, S] where the source has one. All processes yield the same number of full batches; what fills the last
      is zero, with weight 0 and index -1. Call its `close()` when done with it.

    Raises:
      ValueError: sizes that do not fit together, or an empty source.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError('nothing to evaluate: the source holds no examples')
    padded = math.ceil(len(source) / batch_size) * batch_size
    mine = grain.MapDataset.range(padded)[process_index::process_count].map(_MakeEval(source, image_size))
    return iter(_in_background(mine.batch(local, drop_remainder=True), num_workers))


class _MakeTrain(grain.RandomMapTransform):
    def __init__(self, source: Source, image_size: int, augment: Augment | None):
        self._source, self._size, self._augment = source, image_size, augment

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        example = self._source[index]
        image = _readable(example, self._size)
        if self._augment is not None:
            image = self._augment(image, rng)
        return {'image': image, 'label': np.int32(example['label'])}


class _MakeEval(grain.MapTransform):
    def __init__(self, source: Source, image_size: int):
        self._source, self._size = source, image_size
        self._masked = 'mask' in source[0]

    def map(self, index: int) -> dict:
        real = index < len(self._source)
        example = self._source[index if real else 0]
        made = {'image': _readable(example, self._size), 'label': np.int32(example['label'])}
        if self._masked:
            made['mask'] = decode_mask(example['mask'], self._size)
        if not real:
            made = {key: np.zeros_like(value) for key, value in made.items()}
        return made | {'index': np.int32(index if real else -1), 'weight': np.float32(real)}


def _readable(example: dict, size: int) -> np.ndarray:
    try:
        return transforms.resize(decode(example['image']), size)
    except ValueError as error:
        raise ValueError(f'example {example["id"]!r}: {error}') from error


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index={process_index} is outside [0, {process_count - 1}]')
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f'batch_size={batch_size} cannot be split over {process_count} processes: '
                         f'use a positive multiple of {process_count}')
    return batch_size // process_count


def _in_background(batches: grain.MapDataset, num_workers: int) -> grain.IterDataset:
    """Reads ahead in one thread, or in worker processes of one thread each. Same batches, same order."""
    if num_workers < 0:
        raise ValueError(f'num_workers={num_workers} is negative: use 0 for a thread in this process')
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    dataset = batches.to_iter_dataset(ahead)
    if not num_workers:
        return dataset
    if not flags.FLAGS.is_parsed():  # Grain reads its own absl flags; outside of absl's app nobody has parsed them
        flags.FLAGS.mark_as_parsed()
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2))
