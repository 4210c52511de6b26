"""Checkpoints of the whole training state, written in the background by Orbax."""

import functools
import json
import os
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from evit_jax import parallel
from evit_jax.training import storage
from evit_jax.training.state import TrainState

_FIELD = re.compile(r'\d+\.(\w+)(.*)')  # of a stored name: 00001.params['blocks'][0]['norm1']['bias']
_KEYS = re.compile(r"\['?(\w+)'?\]")


def newest_step(workdir: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint of a run; reads only."""
    folder = _folder_in(workdir)
    with storage.reaching(workdir):
        return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def read_newest(workdir: str | os.PathLike, field: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """One field of the state in the newest checkpoint of any run, whatever its config; reads only.

    Args:
      field: of `TrainState`: 'params' or 'ema'.

    Returns:
      Arrays by dotted path in the field (none where the run has no such field), and the JSON kept beside them.

    Raises:
      ValueError: no checkpoint, or one that cannot be read.
    """
    folder, step = _folder_in(workdir), newest_step(workdir)
    if step is None:
        raise ValueError(f'{workdir} holds no checkpoint: give the workdir of a run')
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(folder / str(step) / 'meta')
        names = [name for name in meta['leaves'] if _FIELD.match(name)[1] == field]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(folder / str(step) / 'state', args=ocp.args.PyTreeRestore(
                dict.fromkeys(names, 0), partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})) if names else {}
    except Exception as error:  # as in `restore`
        raise ValueError(f'the checkpoint of step {step} in {folder} cannot be read: {str(error).splitlines()[0]}; '
                         'move it away to use the one before') from error
    return {'.'.join(_KEYS.findall(_FIELD.match(name)[2])): value for name, value in arrays.items()}, meta


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    A save that is cut off leaves no checkpoint, only a temporary folder that is ignored. The data position is the step:
    batches are a function of (seed, step).
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self._folder = _folder_in(workdir)
        self._manager = ocp.CheckpointManager(self._folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True))

    def latest(self) -> int | None:
        """Step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Starts writing; returns as soon as the state has been copied off the devices.

        Args:
          about: JSON kept beside the arrays: config and class_names.
        """
        step = int(state.step)
        if step == self.latest():
            return
        meta = json.loads(json.dumps(about)) | {'next_step': step, 'leaves': _shapes(state)}
        self._manager.save(step, args=ocp.args.Composite(
            state=ocp.args.StandardSave(_named(state)), meta=ocp.args.JsonSave(meta)))

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest readable checkpoint, or None where there is none.

        Args:
          like: abstract arrays with shapes, dtypes and shardings.

        Raises:
          ValueError: there are checkpoints and none can be read, or the newest readable one has other arrays; that
            one is left where it is.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problem = ''
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
                saved = meta['leaves']
                if fits := saved == _shapes(like):
                    restored = self._manager.restore(step, args=ocp.args.Composite(
                        state=ocp.args.StandardRestore(_named(like))))['state']
            except Exception as error:  # Orbax and tensorstore raise many kinds; all mean that this one is unusable
                problem = str(error).partition('\n')[0] or repr(error)
            if parallel.total({'problems': bool(problem)})['problems']:
                logging.warning('checkpoint of step %d cannot be read, trying the one before: %s', step,
                                problem or 'another process says so')
                parallel.first_decides(functools.partial(self._set_aside, step))
                self._manager.reload()
                continue
            if not fits:
                wanted = _shapes(like)
                differ = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
                raise ValueError(f'the checkpoint of step {step} in {self._folder} holds other arrays than this config '
                                 f'makes: {len(differ)} differ, the first is {differ[0]} (there '
                                 f'{saved.get(differ[0])}, here {wanted.get(differ[0])}): use the config it was '
                                 'trained with, or another --workdir')
            return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(restored))
        if steps:
            raise ValueError(f'none of the checkpoints of steps {steps[::-1]} in {self._folder} can be read; they were '
                             f'moved to {self._aside()}: start again in another workdir')
        return None

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go."""
        self.wait()
        self._manager.close()

    def _aside(self):
        return self._folder.parent / 'unreadable_checkpoints'

    def _set_aside(self, step):
        """An unreadable checkpoint must not be in the way when its step is saved again; it is kept for a look."""
        target = self._aside() / str(step)
        while target.exists():
            target = target.with_name(f'{target.name}_again')
        storage.move(self._folder / str(step), target)


def _folder_in(workdir):
    return storage.place(workdir) / 'checkpoints'


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves by path: plain keys that Orbax stores as they are (it would turn a list's numbers into text)."""
    return {f'{number:05d}' + jax.tree_util.keystr(path).replace('/', '_'): leaf
            for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))}


def _shapes(state: TrainState) -> dict[str, list[int]]:
    return {name: list(leaf.shape) for name, leaf in _named(state).items()}
