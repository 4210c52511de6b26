"""From a source to batches, with Grain. What is in a batch is a function of (seed, step) alone.

Neither the number of processes, nor the number of workers, nor where a run was interrupted changes the global batch of
a step. Steps, not iterator states, are what a checkpoint keeps. Grain's element is this process's whole share of a
batch, so the copies of an image that stand in a row are decoded once. (A departure: the reference deals the copies out
to the processes; the global batch is the same.)
"""

import dataclasses
import functools
import gc
import itertools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator

import grain.python as grain
import numpy as np
from absl import flags, logging

from evit_jax.data import order
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms.decode import decode

TrainTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [H, W, 3] -> uint8 [S, S, 3]
EvalTransform = Callable[[np.ndarray], np.ndarray]                        # and `mask(mask)` -> bool [S, S]

_THREAD_AHEAD = 2   # batches that the thread makes while a step runs
_WORKER_QUEUE = 1   # batches that Grain queues for a worker, twice: towards this process, and in it
_TRIES = 16         # other examples tried in place of an unreadable one
_DEATHS = {'-9': ' (killed, often for want of memory)', '-7': ' (no room in shared memory, /dev/shm)'}


def train_batches(source: Source, *, batch_size: int, epochs: int, seed: int, transform: TrainTransform,
                  repeats: int = 1, targets: TokenTargets | None = None, start_step: int = 0, offset: int = 0,
                  num_workers: int = 0, process_index: int = 0, process_count: int = 1) -> 'Batches':
    """This process's share of the shuffled batches from `start_step` to the end of the last epoch.

    An example that cannot be read is replaced by another one, drawn from (seed, epoch, example).

    Args:
      source: every epoch goes through it in another order; without repeats each example comes once.
      batch_size: of the global batch; this process yields rows [p * b, (p + 1) * b) of it, b = batch_size / processes.
      seed: of order and augmentation.
      transform: its Generator is a function of (seed, epoch, example, copy).
      repeats: copies of an image in a row, each augmented anew (repeated augmentation).
      targets: of the tokens of each image; the transform is then asked to `show` (see `TrainTransform`).
      start_step: the first batch yielded is the one that an uninterrupted run has at this step.
      offset: samples by which step s begins after sample s * batch_size, see `training.positions`.
      num_workers: processes that make batches; with 0 a thread does.

    Returns:
      {image: uint8 [b, S, S, 3], label: int32 [b], failed: str [f]}, where `failed` says for each sample that had to be
      replaced which example could not be read, and why; and what `targets` make of each. Call `close()` on the iterator
      when done with it.

    Raises:
      ValueError: sizes that do not fit together. While iterating: no replacement could be read either.
      ChildProcessError: while iterating: a worker process is gone.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if repeats < 1:
        raise ValueError(f'repeats={repeats} is less than 1: use 1 for one copy of each image')
    samples = order.epoch_samples(len(source), repeats) * epochs
    if samples < batch_size:
        raise ValueError(f'batch_size={batch_size} is larger than the data: {samples} samples in {epochs} epochs of '
                         f'{len(source)} examples; lower the batch or add epochs')
    steps = order.train_steps(len(source), batch_size, epochs, repeats, offset)
    if not 0 <= start_step <= steps:
        raise ValueError(f'start_step={start_step} is outside [0, {steps}], the steps of {epochs} epochs; '
                         f'has the batch size or the number of epochs changed since the run began?')
    make = _TrainBatch(source, transform, seed, repeats, local, batch_size, process_index * local + offset, targets)
    batches = Batches(grain.MapDataset.range(start_step, steps).map(make), num_workers)
    megabytes = local * math.prod(make.shape) / 1e6
    logging.info('input: %s at most %d batches of %.1f MB, %.0f MB in all, and an evaluation as many',
                 f'{num_workers} worker processes hold' if num_workers else 'a thread holds', batches.held, megabytes,
                 batches.held * megabytes)
    return batches


def eval_batches(source: Source, *, batch_size: int, transform: EvalTransform, process_index: int = 0,
                 process_count: int = 1, num_workers: int = 0) -> 'Batches':
    """This process's share of the batches in which every example comes once, in the source's order.

    Returns:
      {image: uint8 [b, S, S, 3], label: int32 [b], index: int32 [b], weight: float32 [b], failed: str [f]}, and mask:
      bool [b, S, S] where the examples have one. All processes yield the same number of full batches; what fills the
      last is zero, with weight 0 and index -1. An example that cannot be read has weight 0 and its index; `failed` says
      why. Call `close()` on the iterator when done with it.

    Raises:
      ValueError: sizes that do not fit together, or an empty source.
      ChildProcessError: while iterating: a worker process is gone.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError('nothing to evaluate: the source holds no examples')
    make = _EvalBatch(source, transform, local, batch_size, process_index * local)
    return Batches(grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(make), num_workers)


class Batches(Iterator[dict]):
    """Batches made ahead of time, by a thread or by worker processes of one thread each: the same ones, in order.

    Attributes:
      held: the most batches in memory at one time. Of a worker: the one in the making, its copy in shared memory, those
        queued for this process, those queued in it, and one between the two. Of the thread: those made ahead, and the
        one last taken.
    """

    def __init__(self, batches: grain.MapDataset, num_workers: int):
        if num_workers < 0:
            raise ValueError(f'num_workers={num_workers} is negative: use 0 for a thread in this process')
        self.held = num_workers * (2 * _WORKER_QUEUE + 3) if num_workers else _THREAD_AHEAD + 1
        ahead = 0 if num_workers else _THREAD_AHEAD
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead))
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads its own absl flags; outside of absl's app nobody parsed them
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers, _WORKER_QUEUE), _begin_worker)
        self._iterator = iter(dataset)

    def __next__(self) -> dict:
        if self._iterator is None:
            raise ValueError('the batches are closed')
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if 'terminated unexpectedly' not in str(error):
                raise
            code = str(error).partition('exit code ')[2].partition('.')[0]
            raise ChildProcessError(
                f'a worker process of the input died with exit code {code}{_DEATHS.get(code, "")}; if memory is short, '
                'lower data.workers or the batch size') from error

    def close(self) -> None:
        """Ends thread or workers; no batch can be asked for any more."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None  # left to the interpreter's end, Grain's iterators complain
            gc.collect()           # a cycle in them holds the last batches, in shared memory


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    """Step -> this process's share of the batch."""

    source: Source
    transform: TrainTransform
    seed: int
    repeats: int
    local: int       # rows of the share
    batch_size: int
    first: int       # row of the global batch that is the share's first, plus the offset of the steps
    targets: TokenTargets | None

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return self.transform(_blank(), np.random.default_rng(0)).shape

    def __call__(self, step: int) -> dict:
        of_rows = {'image': (self.shape, np.uint8), 'label': ((), np.int32)} | (
            self.targets.shapes if self.targets else {})
        batch = {name: np.empty((self.local, *shape), dtype) for name, (shape, dtype) in of_rows.items()}
        failed: list[str] = []
        row = 0
        drawn = order.samples(step * self.batch_size + self.first, self.local, len(self.source), seed=self.seed,
                              repeats=self.repeats)
        for (epoch, index), samples in itertools.groupby(drawn, lambda sample: sample[:2]):
            read = functools.cache(self.source.__getitem__)
            decoded = functools.cache(lambda number: decode(read(number)['image']))  # noqa: B023, used in this turn
            for _, _, copy in samples:
                for name, value in self._sample(read, decoded, epoch, index, copy, failed).items():
                    _put(batch[name], row, value)
                row += 1
        return batch | {'failed': np.array(failed, str)}

    def _sample(self, read, decoded, epoch, index, copy, failed):
        """The rows of one sample, or of the first example that is readable in its place."""
        for attempt, number in enumerate(self._candidates(epoch, index)):
            example = None
            try:
                example = read(number)
                rng = order.stream(order.SAMPLE, self.seed, epoch, index, copy)
                return self._rows(example, decoded(number), rng)
            except (ValueError, OSError) as error:
                why = _why(number, example, error)
                failed.extend([why] if attempt == 0 else [])
        raise ValueError(f'{attempt + 1} examples in a row cannot be read, the last one {why!r}; are the data damaged?')

    def _rows(self, example, image, rng):
        if self.targets is None:
            return {'image': self.transform(image, rng), 'label': example['label']}
        shown, part = self.transform.show(image, rng)
        return {'image': shown, 'label': example['label']} | self.targets.rows(example['id'], part)

    def _candidates(self, epoch, index):
        yield index
        others = order.stream(order.REPLACEMENT, self.seed, epoch, index)
        yield from others.integers(len(self.source), size=_TRIES).tolist()


@dataclasses.dataclass(frozen=True)
class _EvalBatch:
    """Number of a batch -> this process's share of it."""

    source: Source
    transform: EvalTransform
    local: int
    batch_size: int
    first: int

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return self.transform(_blank()).shape

    def __call__(self, number: int) -> dict:
        images, labels = np.zeros((self.local, *self.shape), np.uint8), np.zeros(self.local, np.int32)
        weights, failed, masks = np.zeros(self.local, np.float32), [], None
        begin = number * self.batch_size + self.first
        indices = np.arange(begin, begin + self.local, dtype=np.int32)
        indices[indices >= len(self.source)] = -1
        for row, index in enumerate(indices[indices >= 0].tolist()):
            example = None
            try:
                example = self.source[index]
                stored = decode(example['image'])
                image = self.transform(stored)
                mask = self.transform.mask(_mask_of(example, stored)) if 'mask' in example else None
            except (ValueError, OSError) as error:
                failed.append(_why(index, example, error))
                continue
            _put(images, row, image)
            labels[row], weights[row] = example['label'], 1
            if mask is not None:
                masks = np.zeros((self.local, *self.shape[:2]), bool) if masks is None else masks
                _put(masks, row, mask)
        return {'image': images, 'label': labels, 'index': indices, 'weight': weights,
                'failed': np.array(failed, str)} | ({} if masks is None else {'mask': masks})


def _mask_of(example: dict, image: np.ndarray) -> np.ndarray:
    """The example's mask, uint8 [H, W], after a check that it has the proportions of the image."""
    mask = example['mask']
    mask = mask if isinstance(mask, np.ndarray) else decode(mask)[..., 0]
    (height, width), (rows, columns) = image.shape[:2], mask.shape
    if abs(rows - columns * height / width) > max(1, 0.02 * rows):
        raise ValueError(f'its mask has {columns} x {rows} pixels, and the image {width} x {height}: give a mask of '
                         'the same proportions')
    return mask


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker end with its parent, killed or not, and leave to it what stops the whole group of processes.

    A worker that ended by itself would leave shared memory behind, and the run without the batch that it is to finish.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _blank() -> np.ndarray:
    """An image to learn from what a transform makes of it."""
    return np.zeros((64, 64, 3), np.uint8)


def _put(rows: np.ndarray, row: int, value: np.ndarray | int) -> None:
    """Sets a row; numpy would broadcast what has another shape."""
    assert np.shape(value) == rows.shape[1:], f'a transform made {value.shape} once and {rows.shape[1:]} before'
    rows[row] = value


def _why(index: int, example: dict | None, error: Exception) -> str:
    """'id: reason', in one line."""
    name = example['id'] if example else f'example {index}'
    return f'{name}: {" ".join(str(error).split())[:200]}'


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index={process_index} is outside [0, {process_count - 1}]')
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f'batch_size={batch_size} cannot be split over {process_count} processes: '
                         f'use a positive multiple of {process_count}')
    return batch_size // process_count
