"""Compares the config of a resumed run with its recorded config."""

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

# Keys that may change when a run resumes: they do not affect the final parameters, except for rounding.
FREE_IN_TRAINING = ('log.', 'checkpoint.', 'data.workers', 'data.path', 'data.index_cache', 'data.max_failed',
                    'compilation_cache', 'sharding', 'remat', 'model.gather_impl', 'profile_steps', 'nonfinite')
# Keys that only affect step 0. A resumed run keeps its recorded values.
_INITIALISATION = ('init_from', 'init_ema', 'base_model')
# Keys that identify the model: they determine the shapes of the parameters, or the logits.
_MODEL_KEYS = ('model.name', 'model.classes', 'model.distilled', *(f'model.{key}' for key in models.NOT_IN_SHAPES))


def open_workdir(path: str | os.PathLike, config: dict[str, Any], *, accept_changes: bool) -> None:
    """Compares a training config with the run in the workdir, then writes it to the workdir.

    The caller holds the `WorkdirLock`. A key that is missing in the recorded config has its default value.

    Args:
      path: the workdir.
      config: nested training config.
      accept_changes: resume even if the recorded config has other values.

    Raises:
      ValueError: the workdir contains a checkpoint of a run with another config, or cannot be reached.
    """
    folder = storage.as_path(path)
    old = saved_config(folder) if newest_step(folder) is not None else None
    new = flat(config)
    if old is not None:
        if 'batch_size' not in old:
            raise ValueError(f'workdir {folder} holds weights alone, and no training to resume: give another '
                             f'--workdir, and --config.init_from={folder} to start from these weights')
        old = flat(absent()) | old
        new = open_defaults.fill_from_run(new, old) | {
            key: old[key] for key in (*RECORDED, *_INITIALISATION) if key in old}
        differ = _check_changes(folder, old, new, accept_changes)
        if 'segments' not in old and {'batch_size', 'data.repeats'} & {*differ}:
            new['segments'] = [Segment(0, 0, old['batch_size'], old['data.repeats'], None)._asdict()]
    write_flat(folder, new)


def _check_changes(folder, old, new, accept_changes):
    """Returns the keys whose values differ. Raises a ValueError if one of them must not change."""
    old, new = models.resolve(old), models.resolve(new)
    differ = [key for key in sorted(old.keys() | new.keys())
              if old.get(key) != new.get(key) and not key.startswith(FREE_IN_TRAINING)]
    changes = ', '.join(f'{key} {old.get(key)} -> {new.get(key)}' for key in differ)
    if any(key in (*_MODEL_KEYS, 'model.image_size', 'model.image_width') for key in differ):
        raise ValueError(f'workdir {folder} holds a run of another model ({changes}): give another --workdir')
    for key in ('optimizer.accumulate', 'model.freeze'):
        if key in differ:
            raise ValueError(f'workdir {folder} holds a run whose optimizer has a state for another {key} '
                             f'({changes}): keep the old value, or give another --workdir and '
                             f'--config.init_from={folder} to start from its weights')
    if differ and not accept_changes:
        position = ''
        if {'batch_size', 'data.repeats', 'epochs'} & {*differ}:
            position = ', from the position in the epoch that it has reached (examples are counted, not steps)'
        raise ValueError(f'workdir {folder} holds a run with another config ({changes}): give another --workdir, or '
                         f'--accept_changes to continue with the new values{position}')
    if differ:
        logging.warning('continuing with changed config values: %s', changes)
    return differ
