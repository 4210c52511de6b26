"""Distributed runs: joins the processes, provides collectives for numpy arrays, and runs tasks only in process 0."""

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
_JOIN_SECONDS = 300       # time within which all processes of a run must start
_HEARTBEAT_SECONDS = 60   # JAX ends the run if a process sends no heartbeat for this long
_MAX_MESSAGE_BYTES = 2048
_VARIABLES = ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID')
_LOST_PROCESS = re.compile(r'Gloo|NCCL|[Cc]onnection (closed|reset)')  # text in the errors of a broken collective


def start() -> None:
    """Joins the processes of a run and starts the backend. Call it before anything touches a device.

    The environment variables COORDINATOR_ADDRESS (host:port on which process 0 listens), NUM_PROCESSES and PROCESS_ID
    take precedence. If none is set, JAX detects the processes on Cloud TPU and under Slurm, Open MPI and Kubernetes. If
    JAX detects no cluster, the run has a single process.

    JAX aborts a process if the other processes do not start in time, or if it later loses the connection to process 0.

    Raises:
      ValueError: one of the variables is missing or has an invalid value, or there is no backend.
    """
    if settings := _environment_settings(os.environ):
        logging.info('process %d waits up to %d s for all %d processes at %s', settings['process_id'],
                     _JOIN_SECONDS, settings['num_processes'], settings['coordinator_address'])
    try:
        jax.distributed.initialize(**settings, initialization_timeout=_JOIN_SECONDS,
                                   heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except ValueError as error:
        if settings or 'coordinator_address' not in str(error):
            raise
        backend.start()
        return  # JAX detected no cluster
    backend.start()
    if not is_process_zero():
        logging.set_verbosity(logging.WARNING)  # only process 0 reports progress
    logging.info('process %d of %d, %d of %d devices', jax.process_index(), jax.process_count(),
                 jax.local_device_count(), jax.device_count())


@contextlib.contextmanager
def distributed(collective_errors: type[BaseException] | tuple = ()) -> Iterator[None]:
    """Joins the processes of the run. If the body raises an error, this process exits without waiting for the others.

    Args:
      collective_errors: errors that all processes raise at the same point. For these errors, JAX shuts down normally.

    Raises:
      ConnectionError: another process is gone.
    """
    start()
    try:
        yield
    except BaseException as error:
        if not is_single_process() and not isinstance(error, collective_errors):
            # Deadlock: JAX waits for the other processes at exit, and these wait for this one in their next collective.
            atexit.register(_exit_now, error.code if isinstance(error, SystemExit) else 2)
            if isinstance(error, jax.errors.JaxRuntimeError) and _LOST_PROCESS.search(str(error)):
                raise ConnectionError(
                    f'another process of this run has ended, see its log ({backend.first_line(error)}): start all of '
                    'them again, the run continues from its newest checkpoint') from error
        raise


def is_single_process() -> bool:
    """Returns True if the run has a single process."""
    # `process_count` starts a backend, so it is called only if JAX is initialised.
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def is_process_zero() -> bool:
    """Returns True in process 0, which writes the files shared by all processes."""
    return jax.process_index() == 0


def on_process_zero(task: Callable[[], Result]) -> Result | None:
    """Runs a task in process 0 while the others wait. If the task fails, all processes raise an error.

    Returns:
      The result of the task in process 0, None in the other processes.

    Raises:
      ValueError, OSError: the error of the task, in process 0. The other processes raise a ValueError with its text.
    """
    if is_single_process():
        return task()
    result = failure = None
    if is_process_zero():
        try:
            result = task()
        except (ValueError, OSError) as error:
            failure = error
    text = b'' if failure is None else (str(failure) or repr(failure)).encode()[:_MAX_MESSAGE_BYTES]
    padded = np.frombuffer(text.ljust(_MAX_MESSAGE_BYTES), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    if message := received.tobytes().decode(errors='ignore').strip():
        raise failure or ValueError(message)
    return result


def sum_over_processes(values: Mapping[str, float]) -> dict[str, float]:
    """Returns the sum of each value over all processes. All call this at the same point with the same names."""
    if is_single_process():
        return dict(values)
    own = np.array([*values.values()], np.float64)
    # Gather bytes, because JAX would round float64 to float32.
    gathered = np.asarray(multihost_utils.process_allgather(own.view(np.uint8))).reshape(-1).view(np.float64)
    return dict(zip(values, gathered.reshape(-1, len(own)).sum(0).tolist()))


def gather(arrays: Any) -> Any:
    """Concatenates the numpy arrays of all processes along the first axis.

    All processes call this at the same point. The shapes must be equal; elements have at most 32 bits.
    """
    return arrays if is_single_process() else multihost_utils.process_allgather(arrays, tiled=True)


def broadcast(arrays: Any, *, sender: bool) -> Any:
    """Returns the numpy arrays of the process that calls this with `sender=True`, in all processes.

    All processes call this at the same point. The shapes must be equal; elements have at most 32 bits.
    """
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(arrays, is_source=sender))


def _environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns arguments for `jax.distributed.initialize` from environment variables; {} if none is set."""
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


def _exit_now(code: Any) -> None:
    """Exits without waiting for the other processes. Their connections to this process then break."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
