"""Batches placed on the devices ahead of time."""

import queue
import threading
from collections.abc import Iterable, Iterator

from jax.sharding import Mesh

from evit_jax.runtime.sharding import shard_batch


class DevicePrefetcher(Iterator[dict]):
    """Batches placed on the devices ahead of time: a thread reads and places them while the devices compute.

    What goes wrong in reading is raised by `next`. Call `close()` before the batches are closed.
    """

    def __init__(self, batches: Iterable[dict], mesh: Mesh, ahead: int = 2):
        if ahead < 1:
            raise ValueError(f'ahead={ahead} is less than 1')
        self._placed: queue.Queue = queue.Queue(ahead)
        self._closed, self._end = threading.Event(), None
        self._thread = threading.Thread(target=self._place, args=(batches, mesh), name='on devices', daemon=True)
        self._thread.start()

    def __next__(self) -> dict:
        if self._end is None:
            item = self._placed.get()
            if isinstance(item, dict):
                return item
            self._end = item
        raise self._end

    def close(self) -> None:
        """Ends the thread, after the batch that it is at, and lets go of the batches that nobody took."""
        self._closed.set()
        self._thread.join()
        while not self._placed.empty():  # they hold shared memory of the workers, which nothing else would free
            self._placed.get_nowait()
        self._end = self._end or ValueError('the batches are closed')

    def _place(self, batches, mesh):
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
                self._placed.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False
