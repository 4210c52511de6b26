"""Joins the processes of a run; sums, gathers and broadcasts among them; runs a task on process 0 alone."""

import atexit
import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from evit_jax.runtime import backend

Result = TypeVar('Result')
_JOIN_SECONDS = 300   # time within which all processes of a run must start
_SILENT_SECONDS = 60  # a process without a heartbeat for this long counts as dead, and JAX ends the others
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
    if told := _environment_settings(os.environ):
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
    if not is_process_zero():
        logging.set_verbosity(logging.WARNING)  # process 0 alone reports progress


@contextlib.contextmanager
def distributed(agreed: type[BaseException] | tuple = ()) -> Iterator[None]:
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
        if not is_single_process() and not isinstance(error, agreed):
            # JAX would wait at the exit for the others, who wait for this one in their next reduction.
            atexit.register(_leave, error.code if isinstance(error, SystemExit) else 2)
            if isinstance(error, jax.errors.JaxRuntimeError) and _GONE.search(str(error)):
                raise ConnectionError(
                    f'another process of this run is gone, see its log ({backend.first_line(error)}): start all of '
                    'them again, the run continues from its newest checkpoint') from error
        raise


def _environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
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


def is_single_process() -> bool:
    """Whether one process is the whole run."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1  # the second alone would start a backend


def is_process_zero() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def on_process_zero(task: Callable[[], Result]) -> Result | None:
    """Does something in process 0 alone; the others wait, and where it was refused all raise.

    Returns:
      What the task returned, in process 0; None in the others.

    Raises:
      ValueError, OSError: of the task, in process 0; a ValueError with the same text in the others.
    """
    if is_single_process():
        return task()
    result = refusal = None
    if is_process_zero():
        try:
            result = task()
        except (ValueError, OSError) as error:
            refusal = error
    text = b'' if refusal is None else (str(refusal) or repr(refusal)).encode()[:_REFUSAL_BYTES]
    letters = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(_REFUSAL_BYTES), np.uint8))
    if said := np.asarray(letters).tobytes().decode(errors='ignore').strip():
        raise refusal or ValueError(said)
    return result


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all processes, which call this at the same point with the same names."""
    if is_single_process():
        return dict(values)
    own = np.array([*values.values()], np.float64)
    # As bytes, for JAX would round them to float32.
    every = np.asarray(multihost_utils.process_allgather(own.view(np.uint8))).reshape(-1).view(np.float64)
    return dict(zip(values, every.reshape(-1, len(own)).sum(0).tolist()))


def gather(arrays: Any) -> Any:
    """A tree of numpy arrays with those of all processes one after the other along the first axis.

    All processes call this at the same point with arrays of the same shapes, of at most 32 bits an element.
    """
    return arrays if is_single_process() else multihost_utils.process_allgather(arrays, tiled=True)


def broadcast(arrays: Any, *, sender: bool) -> Any:
    """A tree of numpy arrays of one process, in all of them; of at most 32 bits an element.

    All processes call this at the same point with arrays of the same shapes, one of them as the sender.
    """
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays, is_source=sender))
