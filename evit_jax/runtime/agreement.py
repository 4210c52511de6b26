"""Agreement between the processes of a run: all go on with the same values, or all end with the same reason."""

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
    """Does something in every process at the same time; where one of them is refused, all raise.

    Raises:
      Exception: from the task, in its own process; a ValueError that names the process and the reason in the others.
    """
    if distributed.is_single_process():
        return task()
    result = refusal = None
    try:
        result = task()
    except Exception as error:  # any, or the others would wait for this process
        refusal = error
    texts = _texts_of_all('' if refusal is None else str(refusal) or repr(refusal))
    if refusal is not None:
        raise refusal
    if refused := [number for number, text in enumerate(texts) if text]:
        raise ValueError(f'process {refused[0]} cannot go on: {texts[refused[0]]}')
    return result


def check_same(values: Mapping[str, Any], way_out: str) -> None:
    """Compares values of all processes, which call this at the same point.

    Args:
      values: anything with a text, by name.
      way_out: the advice in the message.

    Raises:
      ValueError: in all processes, where one has another value than process 0; names the first and both values.
    """
    if distributed.is_single_process():
        return
    text = json.dumps({name: str(value) for name, value in values.items()})
    if len(set(_texts_of_all(hashlib.blake2b(text.encode()).hexdigest()))) == 1:
        return
    first, *others = [json.loads(text) for text in _texts_of_all(text)]
    for number, other in enumerate(others, 1):
        if differ := [name for name in first | other if first.get(name) != other.get(name)]:
            name, more = differ[0], f' and {len(differ) - 1} more' if len(differ) > 1 else ''
            here, there = (repr(of[name]) if name in of else 'none' for of in (first, other))
            raise ValueError(f'process {number} differs from process 0 in {name}{more}: {there} in process {number}, '
                             f'{here} in process 0; {way_out}')


def _texts_of_all(text: str) -> list[str]:
    """The texts of all processes, by their numbers."""
    own = np.frombuffer(text.encode('utf-8', 'backslashreplace'), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([len(own)], np.int32))).ravel().tolist()
    padded = np.zeros(max(1, *sizes), np.uint8)
    padded[:len(own)] = own
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [row[:size].tobytes().decode() for row, size in zip(rows, sizes)]


def digest_tree(arrays: Any) -> str:
    """A digest of the names and values of a tree of arrays and numbers."""
    made = hashlib.blake2b(digest_size=8)
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        array = np.ascontiguousarray(leaf)
        made.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode())
        made.update(array.tobytes())
    return made.hexdigest()
