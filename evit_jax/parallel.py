"""One mesh over all devices of all processes: the batch is split along `data`, the state whole on each or split too."""

import atexit
import contextlib
import functools
import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from evit_jax import backend

Result = TypeVar('Result')
SHARDINGS = ('replicated', 'fsdp')
_SMALL = 2**14        # elements; FSDP leaves less than this whole: collecting it costs more time than it saves memory
_JOIN_SECONDS = 300   # that the processes of a run may start apart
_SILENT_SECONDS = 60  # without a heartbeat, after which a process counts as dead and the others are ended
_REFUSAL_BYTES = 2048
_VARIABLES = ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')
_GONE = re.compile(r'Gloo|NCCL|[Cc]onnection (closed|reset)')


def start() -> None:
    """Joins the processes of a run and starts the backend; to be called before anything touches a device.

    JAX itself finds the others on Cloud TPU, under Slurm, Open MPI and Kubernetes. Elsewhere, and before what it finds,
    the environment says who they are: COORDINATOR_ADDRESS (host:port at which process 0 listens), NUM_PROCESSES and
    PROCESS_ID. Where there is nothing of it, the process is alone.

    JAX aborts a process that waits in vain for the others to come, and one that later loses process 0.

    Raises:
      ValueError: one of these variables is missing or cannot be; names it. Or there is no backend.
    """
    if told := _told(os.environ):
        logging.info('process %d waits up to %d s for all %d, which meet at %s', told['process_id'], _JOIN_SECONDS,
                     told['num_processes'], told['coordinator_address'])
    try:
        jax.distributed.initialize(**told, initialization_timeout=_JOIN_SECONDS,
                                   heartbeat_timeout_seconds=_SILENT_SECONDS)
    except ValueError as error:
        if told or 'coordinator_address' not in str(error):
            raise
        backend.start()
        return  # JAX has found no cluster
    backend.start()
    logging.info('process %d of %d, %d of %d devices', jax.process_index(), jax.process_count(),
                 jax.local_device_count(), jax.device_count())


@contextlib.contextmanager
def together(agreed: type[BaseException] | tuple = ()) -> Iterator[None]:
    """Starts, and sees to it that no process is left behind by one that fails in the body.

    Args:
      agreed: what all of them raise at the same point; it leaves none behind.

    Raises:
      ConnectionError: another process is gone.
    """
    start()
    try:
        yield
    except BaseException as error:
        if not is_alone() and not isinstance(error, agreed):
            # JAX would wait at the exit for the others, who wait for this one in their next reduction.
            atexit.register(_leave, error.code if isinstance(error, SystemExit) else 2)
            if isinstance(error, jax.errors.JaxRuntimeError) and _GONE.search(str(error)):
                raise ConnectionError(
                    f'another process of this run is gone, see its log ({backend.first_line(error)}): start all of '
                    'them again, the run continues from its newest checkpoint') from error
        raise


def _told(environment: Mapping[str, str]) -> dict[str, Any]:
    """What the environment says of the processes, as `jax.distributed.initialize` takes it."""
    given = {name: environment[name].strip() for name in _VARIABLES if environment.get(name, '').strip()}
    if not given:
        return {}
    for name in _VARIABLES:
        if name not in given:
            raise ValueError(f'{name} is not set, but {", ".join(given)} is: set all of {", ".join(_VARIABLES)}, or '
                             'none for a single process')
    address, count, number = (given[name] for name in _VARIABLES)
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f'COORDINATOR_ADDRESS={address!r} is no host:port: give the address of process 0 and a free '
                         'port there, as 10.0.0.1:8476')
    if not count.isdecimal() or int(count) < 1:
        raise ValueError(f'NUM_PROCESSES={count!r} is no number of processes: give 1 or more, the same to all')
    if not number.isdecimal() or int(number) >= int(count):
        raise ValueError(f'PROCESS_ID={number!r} is outside [0, {int(count) - 1}], for NUM_PROCESSES={count}: count '
                         'the processes from 0')
    return {'coordinator_address': address, 'num_processes': int(count), 'process_id': int(number),
            'cluster_detection_method': 'deactivate'}


def _leave(code: Any) -> None:
    """Ends the process without waiting for others; their connections to it then break."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def is_alone() -> bool:
    """Whether one process is the whole run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1  # the second alone would start a backend


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def first_decides(task: Callable[[], Result]) -> Result | None:
    """Does something in process 0 alone; the others wait, and where it was refused all raise.

    Returns:
      What the task returned, in process 0; None in the others.

    Raises:
      ValueError, OSError: of the task, in process 0; a ValueError with the same text in the others.
    """
    if is_alone():
        return task()
    result = refusal = None
    if is_first():
        try:
            result = task()
        except (ValueError, OSError) as error:
            refusal = error
    text = b'' if refusal is None else (str(refusal) or repr(refusal)).encode()[:_REFUSAL_BYTES]
    letters = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_REFUSAL_BYTES), np.uint8))
    if said := np.asarray(letters).tobytes().decode(errors='ignore').strip():
        raise refusal or ValueError(said)
    return result


def total(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes, which call this at the same point with the same names."""
    if is_alone():
        return dict(values)
    own = np.array([*values.values()], np.float64)
    # As bytes, for JAX would round them to float32.
    every = np.asarray(multihost_utils.process_allgather(own.view(np.uint8))).reshape(-1).view(np.float64)
    return dict(zip(values, every.reshape(-1, len(own)).sum(0).tolist()))


def gathered(arrays: Any) -> Any:
    """A tree of numpy arrays with those of all processes one after the other along the first axis.

    All processes call this at the same point with arrays of the same shapes, of at most 32 bits an element.
    """
    return arrays if is_alone() else multihost_utils.process_allgather(arrays, tiled=True)


def sent(arrays: Any, *, sender: bool) -> Any:
    """A tree of numpy arrays of one process, in all of them; of at most 32 bits an element.

    All processes call this at the same point with arrays of the same shapes, one of them as the sender.
    """
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays, is_source=sender))


def data_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data`, on which the devices of a process are neighbours.

    Args:
      devices: all there are, if not given.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if batch_size % len(devices):
        below = batch_size // len(devices) * len(devices)
        near = ' or '.join(str(size) for size in (below, below + len(devices)) if size)
        raise ValueError(f'batch_size={batch_size} is not divisible by the {len(devices)} devices: use {near}')
    return Mesh(np.asarray(devices), ('data',))


def seen(mesh: Mesh, step: Callable[..., Result]) -> Callable[..., Result]:
    """The step, traced so that what it calls can divide by hand what XLA does not divide over the mesh."""

    @functools.wraps(step)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def state_shardings(state: Any, mesh: Mesh, how: str) -> Any:
    """Where each array of a state lies.

    Args:
      state: a tree of anything with shapes.
      how: 'replicated', or 'fsdp': each array divided among the devices along the largest axis that they divide;
        small ones, and those without such an axis, whole on every device.
    """
    place = {'replicated': lambda shape: replicated(mesh), 'fsdp': lambda shape: _divided(shape, mesh)}[how]
    return jax.tree.map(lambda leaf: place(leaf.shape), state)


def _divided(shape, mesh):
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes or math.prod(shape) < _SMALL:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), 'data'))


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's share of a batch, put on the devices as one global batch."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def own_rows(outputs: Any) -> Any:
    """The rows of a batch's outputs that belong to this process's share of it, as numpy arrays."""
    def rows(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, outputs)


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
        """Ends the thread, after the batch that it is at, and lets go of the batches that nobody took."""
        self._closed.set()
        self._thread.join()
        while not self._placed.empty():  # they hold shared memory of the workers, which nothing else would free
            self._placed.get_nowait()
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
