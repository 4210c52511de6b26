"""Checks that a training continues the run in its workdir with the config that the run began with."""

import os
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import open_defaults
from evit_jax.checkpoints.manager import newest_step
from evit_jax.checkpoints.workdir import RECORDED, flat, saved_config, write_flat
from evit_jax.configs.base import absent
from evit_jax.data.positions import Segment
from evit_jax.runtime import storage

# Keys that a run may change when it continues: they do not alter the final parameters, apart from rounding.
_FREE_IN_TRAINING = ('log.', 'checkpoint.', 'data.workers', 'data.path', 'data.index_cache', 'data.max_failed',
                     'compilation_cache', 'sharding', 'remat', 'model.gather_impl', 'profile_steps', 'nonfinite')
# Keys that only matter at step 0. A run that continues keeps its values.
_INITIALISATION = ('init_from', 'init_ema')
# Keys that identify the model: they decide the shapes of its parameters, or its logits.
_MODEL_KEYS = ('model.name', 'model.classes', 'model.distilled', *(f'model.{key}' for key in models.UNSHAPED))


def open_workdir(path: str | os.PathLike, config: dict[str, Any], *, accept_changes: bool) -> None:
    """Writes the config of a training to its workdir, after comparing it with the run there.

    The caller holds the `WorkdirLock`. A key that the run in the workdir does not have counts as its default.

    Args:
      path: the workdir.
      config: nested config of the training.
      accept_changes: continue although the run began with other values.

    Raises:
      ValueError: the workdir holds a checkpoint of a run with another config, or cannot be reached.
    """
    folder = storage.as_path(path)
    old = saved_config(folder) if newest_step(folder) is not None else None
    new = flat(config)
    if old is not None:
        if 'batch_size' not in old:
            raise ValueError(f'workdir {folder} holds weights alone, and no training that could go on: give another '
                             f'--workdir, and --config.init_from={folder} to start from these weights')
        old = flat(absent()) | old
        new = open_defaults.fill_from_run(new, old) | {
            key: old[key] for key in (*RECORDED, *_INITIALISATION) if key in old}
        differ = _check_changes(folder, old, new, accept_changes)
        if 'segments' not in old and {'batch_size', 'data.repeats'} & {*differ}:
            new['segments'] = [Segment(0, 0, old['batch_size'], old['data.repeats'], None)._asdict()]
    write_flat(folder, new)


def _check_changes(folder, old, new, accept_changes):
    """Returns the keys whose values differ; raises a ValueError where they may not."""
    old, new = models.resolve(old), models.resolve(new)
    differ = [key for key in sorted(old.keys() | new.keys())
              if old.get(key) != new.get(key) and not key.startswith(_FREE_IN_TRAINING)]
    changes = ', '.join(f'{key} {old.get(key)} -> {new.get(key)}' for key in differ)
    if any(key in (*_MODEL_KEYS, 'model.image_size') for key in differ):
        raise ValueError(f'workdir {folder} holds a run of another model ({changes}): give another --workdir')
    if 'optimizer.accumulate' in differ:
        raise ValueError(f'workdir {folder} holds a run whose optimizer counts its updates by another '
                         f'optimizer.accumulate ({changes}): keep the old value, or give another --workdir and '
                         f'--config.init_from={folder} to start from its weights')
    if differ and not accept_changes:
        position = ''
        if {'batch_size', 'data.repeats', 'epochs'} & {*differ}:
            position = ', from the position in the epoch that it has reached (examples are counted, not steps)'
        raise ValueError(f'workdir {folder} holds a run with another config ({changes}): give another --workdir, or '
                         f'--accept_changes to continue with the new values{position}')
    if differ:
        logging.warning('continuing with another config than the run began with: %s', changes)
    return differ
