"""Prepares weights of other programs for a run: the initial weights and the teacher."""

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.lock import WorkdirLock
from evit_jax.checkpoints.manager import newest_step
from evit_jax.interchange import hub
from evit_jax.interchange.opening import is_pretrained
from evit_jax.interchange.pretrained_model import read_pretrained
from evit_jax.runtime import agreement, distributed, storage


def folder_in(workdir: str | os.PathLike) -> str:
    """Returns the folder in a workdir for initial weights that are not those of another run."""
    return os.fspath(storage.as_path(workdir) / 'initial')


def prepare(config: Mapping[str, Any], workdir: str | os.PathLike) -> dict[str, Any]:
    """Returns config values that name the same weights when the run resumes on another day.

    If `init_from` is a Hub name, or a file or folder of another program, the weights are converted to a folder in the
    workdir, and `init_from` becomes this folder. Its config has the commit of the model as `base_model`. A Hub name in
    `teacher.path` gets its commit. A resumed run uses the folder and the commit of its first start.

    Args:
      config: flat config of the training.
      workdir: folder of the run.

    Raises:
      ValueError, OSError: the weights cannot be read or downloaded; see `open_model`.
    """
    resumes = newest_step(workdir) is not None
    recorded = (workdirs.saved_config(workdir) or {}) if resumes else {}
    values = {}
    if config['init_from'] and is_pretrained(config['init_from']):
        distributed.on_process_zero(lambda: _convert(config, workdir, recorded))
        values = {'init_from': folder_in(workdir), 'init_ema': False}
    if hub.is_hub_name(config['teacher.path']):
        values['teacher.path'] = agreement.from_process_zero(lambda: hub.pinned(
            config['teacher.path'], recorded.get('teacher.path', '')))
        logging.info('teacher.path is %s', values['teacher.path'])
    return values


def _convert(config, workdir, recorded):
    """Converts the initial weights, unless a resumed run does not need them or has converted them.

    Args:
      recorded: flat config of the run; {} for a new run.
    """
    folder, name = folder_in(workdir), config['init_from']
    is_teacher = config['distill.kind'] == 'self' and not config['teacher.path']
    if recorded and (not is_teacher or newest_step(folder) is not None):
        return
    if hub.is_hub_name(name):
        name = hub.pinned(name, recorded.get('base_model', ''))
    with WorkdirLock(workdir):
        model = read_pretrained(name, ema=config['init_ema'])
        storage.as_path(folder).rmtree(missing_ok=True)
        weights.save(folder, model.params, model.metadata)
    logging.info('the initial weights are those of %s, converted to %s', name, folder)
