"""Input pipeline: reads batches from a source with Grain. A batch is a function of (seed, step).

The global batch of a step does not depend on the number of processes or workers, or on interruptions. A checkpoint
therefore stores only the step, not the state of an iterator. Each element of the Grain dataset holds all rows of one
batch for this process, so consecutive copies of an image are decoded once. (A departure: DeiT distributes the copies
over the processes; the global batch is the same.)
"""

import gc
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain.python as grain
from absl import flags, logging

from evit_jax.data import order
from evit_jax.data.batching import EvalBatcher, EvalTransform, TrainBatcher, TrainTransform
from evit_jax.data.order import SampleOrder
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.targets import TokenTargets

_THREAD_AHEAD = 2   # batches that the thread prepares while a step runs
_WORKER_QUEUE = 1   # size of each of Grain's two queues per worker: one in shared memory, one in this process
_EXIT_REASONS = {'-9': ' (killed, often because memory is short)', '-7': ' (no room in shared memory, /dev/shm)'}


def train_batches(source: Source, sample_order: SampleOrder, transform: TrainTransform, *,
                  targets: TokenTargets | None = None, start_step: int = 0, num_workers: int = 0,
                  process_index: int = 0, process_count: int = 1) -> 'Batches':
    """Returns this process's rows of the shuffled batches, from `start_step` to the end of the last epoch.

    An unreadable example is replaced by another one, drawn from (seed, epoch, example).

    Args:
      source: examples to train on. Each epoch has another order. If repeats is 1, it visits each example once.
      sample_order: batch size, epochs, seed, repeats and offset. Process p yields rows [p * b, (p + 1) * b) of a batch,
        where b = batch_size / process_count.
      transform: augmentation; its Generator is a function of (seed, epoch, example, copy).
      targets: adds targets for the tokens of each image. The transform then needs `crop_and_augment`; see
        `geometry.TrainTransform`.
      start_step: step of the first batch. It equals the batch of this step in an uninterrupted run.
      num_workers: number of worker processes; 0 for a thread.
      process_index, process_count: index of this process, and the number of processes that divide the batches.

    Returns:
      An iterator over dicts {image: uint8 [b, S, S, 3], label: int32 [b], failed: str [f]}, plus the arrays of
      `targets`. `failed` holds 'id: reason' for each unreadable example. Call `close()` on the iterator at the end.

    Raises:
      ValueError: the sizes do not match, or, during iteration, no replacement is readable.
      ChildProcessError: a worker process died during iteration.
    """
    batch_size, epochs, seed, repeats, offset = sample_order
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
    first = process_index * local + offset
    make_batch = TrainBatcher(source, transform, seed, repeats, local, batch_size, first, targets)
    batches = Batches(grain.MapDataset.range(start_step, steps).map(make_batch), num_workers)
    megabytes = local * math.prod(make_batch.image_shape) / 1e6
    holder = f'{num_workers} worker processes hold' if num_workers else 'a thread holds'
    logging.info('input: %s at most %d batches of %.1f MB, %.0f MB in total; evaluation holds as many', holder,
                 batches.max_held, megabytes, batches.max_held * megabytes)
    return batches


def eval_batches(source: Source, *, batch_size: int, transform: EvalTransform, process_index: int = 0,
                 process_count: int = 1, num_workers: int = 0) -> 'Batches':
    """Returns this process's rows of the evaluation batches. They contain each example once, in the source's order.

    Args:
      batch_size: size of the global batch.
      transform: maps an image to uint8 [S, S, 3].
      process_index, process_count: index of this process, and the number of processes that divide the batches.
      num_workers: number of worker processes; 0 for a thread.

    Returns:
      An iterator over dicts {image: uint8 [b, S, S, 3], label: int32 [b], index: int32 [b], weight: float32 [b],
      failed: str [f]}, with mask: bool [b, S, S] if the examples have masks. All processes yield the same number of
      full batches. Padding rows of the last batch are zero and have weight 0 and index -1. An unreadable example keeps
      its index and has weight 0; `failed` holds 'id: reason'. Call `close()` on the iterator at the end.

    Raises:
      ValueError: the sizes do not match, or the source is empty.
      ChildProcessError: a worker process died during iteration.
    """
    local = _local_batch(batch_size, process_index, process_count)
    if not len(source):
        raise ValueError('nothing to evaluate: the source holds no examples')
    make_batch = EvalBatcher(source, transform, local, batch_size, process_index * local)
    return Batches(grain.MapDataset.range(math.ceil(len(source) / batch_size)).map(make_batch), num_workers)


class Batches(Iterator[dict]):
    """Iterator over batches that are prepared ahead by a thread or by single-threaded worker processes.

    The batches and their order are the same for any number of workers.

    Attributes:
      max_held: maximum number of batches in memory. Each worker accounts for the batch in preparation, its copy in
        shared memory, the batches in both queues, and one between the queues. A thread accounts for the prepared
        batches and the last one returned.
    """

    def __init__(self, batches: grain.MapDataset, num_workers: int):
        if num_workers < 0:
            raise ValueError(f'num_workers={num_workers} is negative: use 0 for a thread in this process')
        self.max_held = num_workers * (2 * _WORKER_QUEUE + 3) if num_workers else _THREAD_AHEAD + 1
        ahead = 0 if num_workers else _THREAD_AHEAD
        dataset = batches.to_iter_dataset(grain.ReadOptions(num_threads=min(ahead, 1), prefetch_buffer_size=ahead))
        if num_workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags
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
                f'a worker process of the input died with exit code {code}{_EXIT_REASONS.get(code, "")}; if memory is '
                'short, lower data.workers or the batch size') from error

    def close(self) -> None:
        """Stops the thread or the workers. The iterator cannot be used afterwards."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None  # Grain's iterators fail if they live until the interpreter exits
            gc.collect()           # a reference cycle in the iterators holds the last batches in shared memory


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker exit when its parent exits, and ignore signals that are sent to the process group.

    A worker that such a signal ended would leak shared memory, and the run could not finish its last step.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def _local_batch(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise ValueError(f'process_index={process_index} is outside [0, {process_count - 1}]')
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f'batch_size={batch_size} cannot be split over {process_count} processes: '
                         f'use a positive multiple of {process_count}')
    return batch_size // process_count
