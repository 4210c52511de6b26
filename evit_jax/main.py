"""Trains:    python -m evit_jax.main --config configs/digits.py --workdir runs/digits
Evaluates: python -m evit_jax.main --mode=evaluate --workdir runs/digits

Any value of the config can be set behind it: --config.keep.rate=0.5
An evaluation takes everything else from the workdir; with --config FILE, FILE gives all but model, image size, mean,
std and crop.
Told to stop by SIGTERM or Ctrl-C it saves and ends with code 75; the same command goes on from there.
"""

import functools
import os
import pathlib
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.training import loop
from evit_jax.training.model_setup import apply_plan

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/digits.py; an evaluation has '
                                          "the run's own config if not given.")
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, pictures.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'Train (and evaluate at the end), or evaluate only.')
_PLAN = flags.DEFINE_string('plan', None, 'File of the planner (python -m evit_jax.plan): the tokens that stay, in '
                            'place of model.reduce_at, model.fuse, keep.rate and reducer.r.')
_OUT = flags.DEFINE_string('out', None, 'Evaluation: file of the result, which ends in .json and has its picture '
                           'beside it, or a folder; WORKDIR/evaluate-PLAN.json if not given.')
_ACCEPT = flags.DEFINE_bool('accept_changes', False, 'Continue a run although its config was another.')

_BASE = pathlib.Path(__file__).parents[1] / 'configs' / 'base.py'  # every key there is


def run() -> None:
    """Starts the program. Without --config, the base config stands in to parse flags like --config.keep.rate=0.5."""
    given = any(re.match(r'--?(config|flagfile)(=|$)', word) for word in sys.argv[1:])
    if not given and _BASE.is_file():
        sys.argv.insert(1, f'--config={_BASE}')
    cli.run(functools.partial(main, from_file=given))


def main(*, from_file: bool = True) -> None:
    """Trains the config in the workdir, or evaluates the workdir.

    Args:
      from_file: the config is of a file that the command line names.
    """
    mode, planned = _MODE.value, read_plan_file(_PLAN.value) if _PLAN.value else None
    config = _CONFIG.value
    if not _WORKDIR.value or config is None or not (from_file or mode == 'evaluate'):
        raise ValueError('give both --config FILE and --workdir DIR, as in: python -m evit_jax.main '
                         '--config configs/digits.py --workdir runs/digits; --mode=evaluate needs --workdir alone')
    if _OUT.value and mode != 'evaluate':
        raise ValueError(f'--out={_OUT.value} is for --mode=evaluate: a training writes into its --workdir')
    _use_compilation_cache(config.compilation_cache)
    workdir = os.path.expanduser(_WORKDIR.value)
    explicit = config_flags.get_override_values(flags.FLAGS['config'])
    with distributed.distributed(agreed=Preempted):
        if mode == 'train':
            config = apply_plan(config, planned, explicit) if planned else config
            loop.train(config, workdir, accept_changes=_ACCEPT.value)
        else:
            loop.evaluate_workdir(config, workdir, explicit=explicit, from_file=from_file, planned=planned,
                                  out=_OUT.value)


def _use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


if __name__ == '__main__':
    run()
