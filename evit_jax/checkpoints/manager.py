"""Checkpoints of the whole training state, written in the background by Orbax."""

import contextlib
import functools
import json
import os
import re
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from evit_jax.checkpoints import checksums
from evit_jax.checkpoints.state import TrainState
from evit_jax.runtime import backend, distributed, storage

_SAVE_SECONDS = 600  # at most of a save; all processes stand still for so long where only some could write their part
_FIELD = re.compile(r'\d+\.(\w+)(.*)')  # of a stored name: 00001.params['blocks'][0]['norm1']['bias']
_SYSTEM = re.compile(r"([^:]+) \[os_error_code=")  # what the system said, at the end of a long line
_KEYS = re.compile(r"\['?(\w+)'?\]")


def newest_step(workdir: str | os.PathLike) -> int | None:
    """Step of the newest checkpoint of a run; reads only."""
    folder = _folder_in(workdir)
    with storage.explain_bucket_errors(workdir):
        return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def read_metadata(workdir: str | os.PathLike) -> dict[str, Any]:
    """The JSON kept beside the newest checkpoint of a run; {} where there is none, or it is damaged.

    Raises:
      ValueError: this machine cannot read it.
    """
    if (step := newest_step(workdir)) is None:
        return {}
    try:
        return _read_meta(_folder_in(workdir) / str(step))
    except Exception as error:  # as in `CheckpointManager.restore`
        if storage.is_machine_failure(error):
            raise ValueError(_not_damaged(_folder_in(workdir), step, error)) from error
        logging.warning('the checkpoint of step %d in %s cannot be read: %s', step, _folder_in(workdir), error)
        return {}


def read_newest(workdir: str | os.PathLike, *fields: str) -> tuple[dict[str, Any], ...]:
    """Fields of the state in the newest checkpoint of any run, whatever its config; reads only.

    Args:
      fields: of `TrainState`: 'params', 'ema'.

    Returns:
      For each field its arrays by dotted path (none where the run has no such field); and the JSON kept beside them.

    Raises:
      ValueError: no checkpoint, one that cannot be read, or no backend.
    """
    backend.start()  # Orbax starts it, too, and its failure must not be told as the checkpoint's
    folder, step = _folder_in(workdir), newest_step(workdir)
    if step is None:
        raise ValueError(f'{workdir} holds no checkpoint: give the workdir of a run')
    whole = False
    try:
        whole = checksums.check(folder / str(step))
        meta = _read_meta(folder / str(step))
        names = [name for name in meta['leaves'] if _FIELD.match(name)[1] in fields]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(folder / str(step) / 'state', args=ocp.args.PyTreeRestore(
                dict.fromkeys(names, 0), partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})) if names else {}
    except Exception as error:  # as in `restore`
        if whole or storage.is_machine_failure(error):
            raise ValueError(_not_damaged(folder, step, error)) from error
        raise ValueError(f'the checkpoint of step {step} in {folder} cannot be read: {backend.first_line(error)}; '
                         'move it away to use the one before') from error
    found = {field: {} for field in fields}
    for name, value in arrays.items():
        field, path = _FIELD.match(name).groups()
        found[field]['.'.join(_KEYS.findall(path))] = value
    return *found.values(), meta


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / 'meta')


class _Manager(ocp.CheckpointManager):
    """Does not ask JAX for preemption: `PreemptionHandler` does, with a count of its own that Orbax's would spoil."""

    def reached_preemption(self, step: int) -> bool:
        return False


class CheckpointManager:
    """The checkpoints of one run, in `workdir/checkpoints`.

    A save that is cut off leaves no checkpoint, only a temporary folder that is ignored. The data position is the step:
    batches are a function of (seed, step).
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self._folder, self._keep = _folder_in(workdir), keep
        self._manager = self._open()
        self._writing: int | None = None  # the step that is being saved
        self._begun = 0.0                 # when that was
        self._failure = ''                # of that save
        self._lost = ''                   # what became of the newest save, if it failed

    def latest(self) -> int | None:
        """Step of the newest checkpoint on disk; waits for the one that is being written."""
        self._finish()
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts writing; returns as soon as the state has been copied off the devices.

        A save that fails, as for want of room, is told in the log, harms no other checkpoint, and may succeed the next
        time.

        Args:
          about: JSON kept beside the arrays: config and class_names.
        """
        step = int(state.step)
        if step == self.latest():
            return
        self._remove_unfinished()  # of a process that was killed, too
        self._writing, self._begun, self._lost = step, time.perf_counter(), ''
        meta = json.loads(json.dumps(metadata)) | {'next_step': step, 'leaves': _shapes(state)}
        try:
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named(state)), meta=ocp.args.JsonSave(meta)))
            logging.info('saving step %d in %s; the training stood still for %.2f s', step, self._folder,
                         time.perf_counter() - self._begun)
        except Exception as error:  # of many kinds, as in `restore`
            self._failure = _reason(error)

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest readable checkpoint, or None where there is none.

        Args:
          like: abstract arrays with shapes, dtypes and shardings.

        Raises:
          ValueError: there are checkpoints and none can be read, or the newest readable one has other arrays, or this
            machine cannot read a whole one; both are left where they are.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problem, whole = self._damage(step)
            found = distributed.sum_over_processes({'damaged': bool(problem), 'whole': whole})
            if not found['damaged']:  # or some would wait for others in `restore`
                try:
                    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
                    saved = meta['leaves']
                    if fits := saved == _shapes(like):
                        restored = self._manager.restore(step, args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(_named(like))))['state']
                except Exception as error:  # Orbax and tensorstore raise many kinds
                    if found['whole'] or storage.is_machine_failure(error):
                        raise ValueError(_not_damaged(self._folder, step, error)) from error
                    problem = _reason(error)
            if distributed.sum_over_processes({'problems': bool(problem)})['problems']:
                logging.warning('checkpoint of step %d cannot be read, trying the one before: %s', step,
                                problem or 'another process says so')
                distributed.on_process_zero(functools.partial(self._set_aside, step))
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
        """Returns when everything saved is on disk.

        Raises:
          OSError: the newest save failed.
        """
        last = self.latest()
        if self._lost:
            kept = f'the newest is that of step {last}' if last is not None else 'there is none'
            raise OSError(f'{self._lost}; {kept}. Make room in {self._folder}, then start again')

    def close(self) -> None:
        """Lets go, once a save under way is finished, or has failed."""
        try:
            self._manager.close()
        except Exception as error:
            logging.warning('the last checkpoint could not be written: %s', _reason(error))

    def _open(self):
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=os.fspath(self._folder).replace('/', '_'))
        return _Manager(self._folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=True, multiprocessing_options=apart,
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS, post_finalization_callback=self._seal)))

    def _seal(self):
        """Called by Orbax in process 0, in the thread that saves, when every file is there and before the commit."""
        final = self._folder / str(self._writing)
        temporary = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
        checksums.write(temporary if temporary.exists() else final)  # in a bucket a file says that it is finished
        logging.info('step %d is written, %.1f s after its save began', self._writing,
                     time.perf_counter() - self._begun)

    def _damage(self, step):
        """The damage that the sums show, and whether they show that there is none; in process 0 alone."""
        whole = False
        try:
            if distributed.is_process_zero() and not (whole := checksums.check(self._folder / str(step))):
                logging.info('the checkpoint of step %d has no sums: an older version wrote it', step)
        except (ValueError, OSError) as error:
            if storage.is_machine_failure(error):
                raise ValueError(_not_damaged(self._folder, step, error)) from error
            return _reason(error), False
        return '', whole

    def _finish(self):
        """Waits for the save under way; one that failed is told, and what is left of it removed, by all processes."""
        if self._writing is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failure = self._failure or _reason(error)
        if distributed.sum_over_processes({'failed': bool(self._failure)})['failed']:
            self._lost = (f'the checkpoint of step {self._writing} could not be written: '
                          f'{self._failure or "another process says so"}')
            logging.warning('%s; the run goes on without it', self._lost)
            with contextlib.suppress(Exception):  # that it holds, it would raise at the next save
                self._manager.close()
            self._remove_unfinished()
            self._manager = self._open()
        self._writing, self._failure = None, ''

    def _remove_unfinished(self):
        """Saves that were cut off take room and are never finished."""
        for path in self._folder.iterdir() if distributed.is_process_zero() else ():
            with contextlib.suppress(OSError):  # threads of a failed save may still write; then the next time
                if path.name.partition('.')[0].isdigit() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree(missing_ok=True)

    def _aside(self):
        return self._folder.parent / 'unreadable_checkpoints'

    def _set_aside(self, step):
        """An unreadable checkpoint must not be in the way when its step is saved again; it is kept for a look."""
        target = self._aside() / str(step)
        while target.exists():
            target = target.with_name(f'{target.name}_again')
        storage.move(self._folder / str(step), target)


def _folder_in(workdir):
    return storage.as_path(workdir) / 'checkpoints'


def _not_damaged(folder: epath.Path, step: int, error: Exception) -> str:
    return (f'the checkpoint of step {step} in {folder} shows no damage, and this machine failed to read it '
            f'({_reason(error)}): leave it where it is, solve that, and start again')


def _reason(error: Exception) -> str:
    line = backend.first_line(error)
    return said[1].strip() if (said := _SYSTEM.search(line)) else line


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves by path: plain keys that Orbax stores as they are (it would turn a list's numbers into text)."""
    return {f'{number:05d}' + jax.tree_util.keystr(path).replace('/', '_'): leaf
            for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(state))}


def _shapes(state: TrainState) -> dict[str, list[int]]:
    return {name: list(leaf.shape) for name, leaf in _named(state).items()}
