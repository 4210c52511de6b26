"""Compares values between the processes of a run. All processes continue, or all raise an error."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from evit_jax.runtime import distributed

Result = TypeVar('Result')


def on_every_process(task: Callable[[], Result]) -> Result:
    """Runs a task in every process. All processes call this at the same point. If one fails, all raise an error.

    Raises:
      Exception: the error of the task, in the process where it failed. The other processes raise a ValueError that
        names this process and the reason.
    """
    if distributed.is_single_process():
        return task()
    result = failure = None
    try:
        result = task()
    except Exception as error:  # any type: otherwise the other processes would wait for this one
        failure = error
    messages = _gather_texts('' if failure is None else str(failure) or repr(failure))
    if failure is not None:
        raise failure
    if failed := [number for number, message in enumerate(messages) if message]:
        raise ValueError(f'process {failed[0]} cannot continue: {messages[failed[0]]}')
    return result


def from_process_zero(task: Callable[[], str]) -> str:
    """Runs a task in process 0. Returns its text in every process.

    Raises:
      ValueError, OSError: see `distributed.on_process_zero`.
    """
    text = distributed.on_process_zero(task)
    return text if distributed.is_single_process() else _gather_texts(text or '')[0]


def check_same(values: Mapping[str, Any], way_out: str) -> None:
    """Checks that all processes have the same values. All processes call this at the same point.

    Args:
      values: values by name; they are compared as text.
      way_out: advice to the user, at the end of the error message.

    Raises:
      ValueError: a value of some process differs from that of process 0. All processes raise it; the message gives the
        first such value in both processes.
    """
    if distributed.is_single_process():
        return
    text = json.dumps({name: str(value) for name, value in values.items()})
    if len(set(_gather_texts(hashlib.blake2b(text.encode()).hexdigest()))) == 1:
        return
    first, *others = [json.loads(text) for text in _gather_texts(text)]
    for number, other in enumerate(others, 1):
        if differ := [name for name in first | other if first.get(name) != other.get(name)]:
            name, more = differ[0], f' and {len(differ) - 1} more' if len(differ) > 1 else ''
            expected, actual = (repr(values[name]) if name in values else 'none' for values in (first, other))
            raise ValueError(f'process {number} differs from process 0 in {name}{more}: {actual} in process {number}, '
                             f'{expected} in process 0; {way_out}')


def digest_tree(arrays: Any) -> str:
    """Returns a digest of the names, dtypes, shapes and values of a tree of arrays and numbers."""
    digest = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes, ordered by process index."""
    own = np.frombuffer(text.encode('utf-8', 'backslashreplace'), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(own)], np.int32))).ravel().tolist()
    padded = np.zeros(max(1, *sizes), np.uint8)
    padded[:len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]
