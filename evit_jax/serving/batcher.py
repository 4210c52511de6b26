"""Joins waiting images into batches of fixed sizes, which one thread computes."""

import collections
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from evit_jax.serving.engines import Engine, Outputs


class QueueFull(Exception):
    """Raised if too many images are waiting."""


class Answer(NamedTuple):
    """The outputs of one image, with the batch that computed them."""

    outputs: Outputs   # without the batch axis
    seconds: float     # time of the program
    batch_size: int    # number of images in the batch, without padding


class _Item(NamedTuple):
    image: np.ndarray
    future: Future
    time: float


def batch_sizes(max_batch: int) -> tuple[int, ...]:
    """Returns the sizes of the compiled batches: the powers of two below `max_batch`, and `max_batch`."""
    return (*(2**power for power in range((max_batch - 1).bit_length())), max_batch)


class Batcher:
    """Joins images of one plan until a batch is full or the oldest image has waited long enough.

    A batch is padded to the next size of `batch_sizes`. The plan of the oldest image is computed first.

    Args:
      engine: computes a batch.
      max_batch: largest number of images in a batch.
      max_wait: longest time in seconds that an image waits for others while the engine is idle.
      max_queue: largest number of waiting images.
      observe: called after each batch with plan, number of images and seconds.
    """

    def __init__(self, engine: Engine, *, max_batch: int, max_wait: float, max_queue: int,
                 observe: Callable[[str, int, float], None] = lambda plan, count, seconds: None):
        self.sizes = batch_sizes(max_batch)
        self._engine, self._observe = engine, observe
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._waiting: dict[str, collections.deque[_Item]] = {}  # plan -> images, oldest first; no queue is empty
        self._changed, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name='batcher', daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """The number of images that wait for a batch."""
        with self._changed:
            return self._count()

    def submit(self, plan: str, images: Sequence[np.ndarray]) -> list[Future]:
        """Queues images, all or none. Returns a future with an `Answer` for each.

        Raises:
          QueueFull: there is no room for all of them, or the batcher is closed.
        """
        items = [_Item(image, Future(), time.monotonic()) for image in images]
        with self._changed:
            if self._closed or self._count() + len(items) > self._max_queue:
                raise QueueFull
            self._waiting.setdefault(plan, collections.deque()).extend(items)
            self._changed.notify()
        return [item.future for item in items]

    def close(self) -> None:
        """Computes what is waiting, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _count(self):
        return sum(map(len, self._waiting.values()))

    def _work(self):
        while (taken := self._next_batch()) is not None:
            plan, items = taken
            items = [item for item in items if item.future.set_running_or_notify_cancel()]
            if items:
                self._compute(plan, items)

    def _next_batch(self):
        """Waits for the next batch. Returns its plan and items; None if the batcher is closed and nothing waits."""
        with self._changed:
            while True:
                if not self._waiting:
                    if self._closed:
                        return None
                    self._changed.wait()
                    continue
                plan = min(self._waiting, key=lambda name: self._waiting[name][0].time)
                queue = self._waiting[plan]
                remaining = queue[0].time + self._max_wait - time.monotonic()
                if len(queue) >= self._max_batch or remaining <= 0 or self._closed:
                    items = [queue.popleft() for _ in range(min(len(queue), self._max_batch))]
                    if not queue:
                        del self._waiting[plan]
                    return plan, items
                self._changed.wait(remaining)

    def _compute(self, plan, items):
        size = next(size for size in self.sizes if size >= len(items))
        batch = np.zeros((size, *items[0].image.shape), np.uint8)
        for row, item in enumerate(items):
            batch[row] = item.image
        begin = time.perf_counter()
        try:
            outputs = self._engine(plan, batch)
        except Exception as error:  # an error of one batch must not end the thread
            for item in items:
                item.future.set_exception(error)
            return
        seconds = time.perf_counter() - begin
        for row, item in enumerate(items):
            item.future.set_result(Answer(outputs.row(row), seconds, len(items)))
        self._observe(plan, len(items), seconds)
