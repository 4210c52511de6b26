"""Transfers batches to the devices ahead of time."""

import queue
import threading
from collections.abc import Iterable, Iterator

from jax.sharding import Mesh

from evit_jax.runtime.sharding import shard_batch


class DevicePrefetcher(Iterator[dict]):
    """Iterates over batches on the devices. A thread reads and transfers the next batches while the devices compute.

    `next` raises errors that occur in the thread. Call `close()` before closing the batches.

    Args:
      batches: the part of each batch that this process loads, as numpy arrays.
      mesh: device mesh; each batch is split over it.
      ahead: number of batches to hold on the devices, 1 or more.
    """

    def __init__(self, batches: Iterable[dict], mesh: Mesh, ahead: int = 2):
        if ahead < 1:
            raise ValueError(f'ahead={ahead} is less than 1')
        self._queue: queue.Queue = queue.Queue(ahead)
        self._closed, self._end = threading.Event(), None
        self._thread = threading.Thread(target=self._transfer, args=(batches, mesh), name='prefetch', daemon=True)
        self._thread.start()

    def __next__(self) -> dict:
        if self._end is None:
            item = self._queue.get()
            if isinstance(item, dict):
                return item
            self._end = item
        raise self._end

    def close(self) -> None:
        """Ends the thread after its current batch, and discards the remaining batches."""
        self._closed.set()
        self._thread.join()
        while not self._queue.empty():  # frees the shared memory of the workers
            self._queue.get_nowait()
        self._end = self._end or ValueError('the batches are closed')

    def _transfer(self, batches, mesh):
        try:
            for batch in batches:
                if not self._put(shard_batch(batch, mesh)):
                    return
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False
