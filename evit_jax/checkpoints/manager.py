"""Saves and restores the whole training state; Orbax writes it in the background."""

import contextlib
import functools
import json
import os
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from evit_jax.checkpoints import checksums, layout
from evit_jax.checkpoints.state import TrainState
from evit_jax.runtime import backend, distributed, storage

_SAVE_SECONDS = 600  # time limit of a save; all processes wait this long if only some can write


def newest_step(workdir: str | os.PathLike) -> int | None:
    """Returns the step of the newest checkpoint of a run, or None. Does not write."""
    folder = layout.checkpoints_folder(workdir)
    with storage.explain_bucket_errors(workdir):
        return max(ocp.utils.checkpoint_steps(folder), default=None) if folder.is_dir() else None


def read_metadata(workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns the JSON metadata of the newest checkpoint of a run; {} if it is missing or damaged.

    Raises:
      ValueError: this machine cannot read the checkpoint, or an older version of evit_jax wrote it.
    """
    if (step := newest_step(workdir)) is None:
        return {}
    folder = layout.checkpoints_folder(workdir)
    try:
        metadata = _read_meta(folder / str(step))
    except Exception as error:  # Orbax and tensorstore raise many types
        if storage.is_machine_failure(error):
            raise ValueError(layout.not_damaged(folder, step, error)) from error
        logging.warning('the checkpoint of step %d in %s cannot be read: %s', step, folder, error)
        return {}
    layout.check_version(metadata.get('config', {}), workdir)
    return metadata


def read_newest(workdir: str | os.PathLike, *fields: str) -> tuple[dict[str, Any], ...]:
    """Reads fields of the newest checkpoint of a run. Does not need the config of the run, and does not write.

    Args:
      workdir: folder of the run.
      fields: fields of `TrainState`, such as 'params' or 'ema'.

    Returns:
      One dict for each field, which maps dotted paths to numpy arrays (empty if the run lacks the field), followed by
      the metadata.

    Raises:
      ValueError: there is no checkpoint or no backend, or the checkpoint cannot be read.
    """
    backend.start()  # otherwise a missing backend looks like a damaged checkpoint
    folder, step = layout.checkpoints_folder(workdir), newest_step(workdir)
    if step is None:
        raise ValueError(f'{workdir} holds no checkpoint: give the workdir of a run')
    intact = False
    try:
        intact = checksums.check(folder / str(step))
        meta = _read_meta(folder / str(step))
        names = [name for name in meta['leaves'] if layout.split_name(name)[0] in fields]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            arrays = reader.restore(folder / str(step) / 'state', args=ocp.args.PyTreeRestore(
                dict.fromkeys(names, 0), partial_restore=True,
                restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})) if names else {}
    except Exception as error:  # Orbax and tensorstore raise many types
        if intact or storage.is_machine_failure(error):
            raise ValueError(layout.not_damaged(folder, step, error)) from error
        raise ValueError(f'the checkpoint of step {step} in {folder} cannot be read: {backend.first_line(error)}; '
                         'move it away to use the one before') from error
    layout.check_version(meta.get('config', {}), workdir)
    arrays_of = {field: {} for field in fields}
    for name, value in arrays.items():
        field, path = layout.split_name(name)
        arrays_of[field][path] = value
    return *arrays_of.values(), meta


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(folder / 'meta')


class _OrbaxManager(ocp.CheckpointManager):
    """Orbax's manager without its preemption check.

    `PreemptionHandler` counts the synchronisation points of JAX's preemption service. Orbax would disturb this count.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class CheckpointManager:
    """Saves and restores the checkpoints of one run, in `workdir/checkpoints`.

    An interrupted save leaves only a temporary folder, which is ignored. The position in the data is not stored, since
    batches are a function of (seed, step). All processes call every method at the same point.

    Args:
      workdir: folder of the run.
      keep: number of checkpoints to keep; older ones are deleted.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int):
        self._folder, self._keep = layout.checkpoints_folder(workdir), keep
        self._manager = self._open()
        self._saving_step: int | None = None  # step of the current save
        self._save_begin = 0.0                # time.perf_counter() at the start of the current save
        self._failure = ''                    # reason why the current save failed in this process
        self._lost = ''                       # error message of the newest save, if it failed

    def latest(self) -> int | None:
        """Waits for the current save, then returns the step of the newest checkpoint on disk."""
        self._finish_save()
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Starts a save, and returns when the state has been copied from the devices.

        A failed save (for example, on a full disk) is logged. It does not affect other checkpoints or later saves.

        Args:
          state: the state to save.
          metadata: JSON stored with the arrays: `config` and `class_names`.
        """
        step = int(state.step)
        if step == self.latest():
            return
        self._remove_unfinished()  # includes unfinished saves of a killed process
        self._saving_step, self._save_begin, self._lost = step, time.perf_counter(), ''
        meta = json.loads(json.dumps(metadata)) | {'next_step': step, 'leaves': layout.shapes(state)}
        try:
            self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.StandardSave(layout.named_leaves(state)), meta=ocp.args.JsonSave(meta)))
            logging.info('saving step %d in %s; training paused for %.2f s', step, self._folder,
                         time.perf_counter() - self._save_begin)
        except Exception as error:  # Orbax and tensorstore raise many types
            self._failure = layout.reason(error)

    def restore(self, like: TrainState) -> TrainState | None:
        """Returns the newest readable checkpoint, or None if there are no checkpoints.

        An unreadable checkpoint is moved to `workdir/unreadable_checkpoints`; then the previous checkpoint is tried.

        Args:
          like: state of abstract arrays, with shapes, dtypes and shardings.

        Raises:
          ValueError: no checkpoint can be read; the newest readable checkpoint contains other arrays; or this machine
            failed to read an undamaged checkpoint. In the last two cases the checkpoint is not moved.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problem, saved, arrays = self._read(step, like)
            if distributed.sum_over_processes({'problems': bool(problem)})['problems']:
                logging.warning('checkpoint of step %d cannot be read, trying the previous one: %s', step,
                                problem or 'another process failed to read it')
                distributed.on_process_zero(functools.partial(self._set_aside, step))
                self._manager.reload()
                continue
            if arrays is None:
                raise ValueError(self._other_arrays(step, saved, layout.shapes(like)))
            return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(arrays))
        if steps:
            raise ValueError(f'none of the checkpoints of steps {steps[::-1]} in {self._folder} can be read; they were '
                             f'moved to {self._unreadable_folder()}: start again in another workdir')
        return None

    def wait(self) -> None:
        """Waits until all saves have ended.

        Raises:
          OSError: the newest save failed.
        """
        last = self.latest()
        if self._lost:
            kept = f'the newest is that of step {last}' if last is not None else 'there is none'
            raise OSError(f'{self._lost}; {kept}. Make room in {self._folder}, then start again')

    def close(self) -> None:
        """Waits for the current save, then stops the threads of Orbax."""
        try:
            self._manager.close()
        except Exception as error:
            logging.warning('the last checkpoint could not be written: %s', layout.reason(error))

    def _open(self):
        apart = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=os.fspath(self._folder).replace('/', '_'))
        return _OrbaxManager(self._folder, options=ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, enable_async_checkpointing=True, multiprocessing_options=apart,
            async_options=ocp.AsyncOptions(timeout_secs=_SAVE_SECONDS, post_finalization_callback=self._write_sums)))

    def _write_sums(self):
        """Writes the checksums. Orbax calls this in process 0, after all files are written and before the commit."""
        final = self._folder / str(self._saving_step)
        temporary = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
        # A bucket has no temporary folder: a marker file commits the final one.
        checksums.write(temporary if temporary.exists() else final)
        logging.info('step %d is written, %.1f s after its save began', self._saving_step,
                     time.perf_counter() - self._save_begin)

    def _read(self, step, like):
        """Returns the reason why a step cannot be read (or ''), its shapes, and its arrays if they match `like`."""
        problem, intact = self._damage(step)
        flags = distributed.sum_over_processes({'damaged': bool(problem), 'intact': intact})
        if flags['damaged']:  # in some process: skip `restore` in all, or the others would wait in it
            return problem, None, None
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))['meta']
            saved = meta['leaves']
            if saved != layout.shapes(like):
                return '', saved, None
            return '', saved, self._manager.restore(step, args=ocp.args.Composite(
                state=ocp.args.StandardRestore(layout.named_leaves(like))))['state']
        except Exception as error:  # Orbax and tensorstore raise many types
            if flags['intact'] or storage.is_machine_failure(error):
                raise ValueError(layout.not_damaged(self._folder, step, error)) from error
            return layout.reason(error), None, None

    def _other_arrays(self, step, saved, wanted):
        differ = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        return (f'the checkpoint of step {step} in {self._folder} holds other arrays than this config makes: '
                f'{len(differ)} differ, the first is {differ[0]} (there {saved.get(differ[0])}, here '
                f'{wanted.get(differ[0])}): use the config it was trained with, or another --workdir')

    def _damage(self, step):
        """Compares the files with their checksums; only process 0 does so.

        Returns:
          A description of the damage ('' if none was found), and whether checksums confirm that the files are intact.
        """
        intact = False
        try:
            if distributed.is_process_zero() and not (intact := checksums.check(self._folder / str(step))):
                logging.info('the checkpoint of step %d has no checksums: an older version wrote it', step)
        except (ValueError, OSError) as error:
            if storage.is_machine_failure(error):
                raise ValueError(layout.not_damaged(self._folder, step, error)) from error
            return layout.reason(error), False
        return '', intact

    def _finish_save(self):
        """Waits for the current save. If it failed, every process logs a warning and removes the partial checkpoint."""
        if self._saving_step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failure = self._failure or layout.reason(error)
        if distributed.sum_over_processes({'failed': bool(self._failure)})['failed']:
            self._lost = (f'the checkpoint of step {self._saving_step} could not be written: '
                          f'{self._failure or "another process failed"}')
            logging.warning('%s; the run continues without it', self._lost)
            with contextlib.suppress(Exception):  # the manager repeats the stored error
                self._manager.close()
            self._remove_unfinished()
            self._manager = self._open()
        self._saving_step, self._failure = None, ''

    def _remove_unfinished(self):
        """Removes the folders of interrupted saves, to free disk space."""
        for path in self._folder.iterdir() if distributed.is_process_zero() else ():
            with contextlib.suppress(OSError):  # a thread of a failed save may still write; the next call retries
                if path.name.partition('.')[0].isdigit() and ocp.utils.is_tmp_checkpoint(path):
                    path.rmtree(missing_ok=True)

    def _unreadable_folder(self):
        return self._folder.parent / 'unreadable_checkpoints'

    def _set_aside(self, step):
        """Moves an unreadable checkpoint to another folder, so that its step can be saved again."""
        target = self._unreadable_folder() / str(step)
        while target.exists():
            target = target.with_name(f'{target.name}_again')
        storage.move(self._folder / str(step), target)
