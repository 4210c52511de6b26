"""One mesh over all devices: the batch is split along `data`, the state is on every device."""

import queue
import threading
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices with the one axis `data`.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        below = batch_size // len(devices) * len(devices)
        near = ' or '.join(str(size) for size in (below, below + len(devices)) if size)
        raise ValueError(f'batch_size={batch_size} is not divisible by the {len(devices)} devices: use {near}')
    return Mesh(np.asarray(devices), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's share of a batch, put on the devices as one global batch."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


class OnDevices(Iterator[dict]):
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
        """Ends the thread, after the batch that it is at."""
        self._closed.set()
        self._thread.join()
        self._end = self._end or ValueError('the batches are closed')

    def _place(self, batches, mesh):
        try:
            for batch in batches:
                if not self._put(place_batch(batch, mesh)):
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
