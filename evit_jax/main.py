"""Trains:    python -m evit_jax.main --config digits --workdir runs/digits
Evaluates: python -m evit_jax.main --mode=evaluate --workdir runs/digits

--config takes the name of a recipe or a Python file with get_config(). Flags after it override config keys, as in
--config.keep.rate=0.5; --helpkeys lists the keys.
An evaluation takes its config from the workdir. With --config FILE it takes from FILE all keys but the model, the image
size, mean, std and crop.
On SIGTERM or Ctrl-C a training saves a checkpoint and ends with exit code 75; the same command continues it.
"""

import functools
import os
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import cli, config_errors
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.training import loop
from evit_jax.training.model_setup import apply_plan

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Name of a recipe, as digits, or a Python file with '
                                          "get_config(); an evaluation uses the run's own config if not given.")
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, pictures.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'Train (and evaluate at the end), or evaluate only.')
_PLAN = flags.DEFINE_string('plan', None, 'File with a token plan (python -m evit_jax.plan); it replaces '
                            'model.reduce_at, model.fuse, keep.rate and reducer.r.')
_OUT = flags.DEFINE_string('out', None, 'Evaluation: file for the result, which ends in .json, or a folder; the '
                           'picture is written beside it. WORKDIR/evaluate-PLAN.json if not given.')
_ACCEPT = flags.DEFINE_bool('accept_changes', False, 'Continue a run with another config than it began with.')


def run() -> None:
    """Starts the program. Without --config, the base config is used to parse flags such as --config.keep.rate=0.5."""
    given = any(re.match(r'--?(config|flagfile)(=|$)', word) for word in sys.argv[1:])
    if not given:
        sys.argv.insert(1, f'--config={config_errors.BASE}')
    cli.run(functools.partial(main, from_file=given))


def main(*, from_file: bool = True) -> None:
    """Trains the config in the workdir, or evaluates the workdir.

    Args:
      from_file: whether the command line names the file of the config.
    """
    mode, plan_file = _MODE.value, read_plan_file(_PLAN.value) if _PLAN.value else None
    config = _CONFIG.value
    if not _WORKDIR.value or config is None or not (from_file or mode == 'evaluate'):
        raise ValueError('give both --config FILE and --workdir DIR, as in: python -m evit_jax.main '
                         '--config configs/digits.py --workdir runs/digits; --mode=evaluate needs --workdir alone')
    if _OUT.value and mode != 'evaluate':
        raise ValueError(f'--out={_OUT.value} is for --mode=evaluate: a training writes into its --workdir')
    _use_compilation_cache(config.compilation_cache)
    workdir = os.path.expanduser(_WORKDIR.value)
    explicit = config_flags.get_override_values(flags.FLAGS['config'])
    with distributed.distributed(collective_errors=Preempted):
        if mode == 'train':
            config = apply_plan(config, plan_file, explicit) if plan_file else config
            loop.train(config, workdir, accept_changes=_ACCEPT.value)
        else:
            loop.evaluate_workdir(config, workdir, explicit=explicit, from_file=from_file, planned=plan_file,
                                  out=_OUT.value)


def _use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


if __name__ == '__main__':
    run()
