"""Trains or evaluates: python -m evit_jax.main --config configs/digits.py --workdir runs/digits

Any value of the config can be set behind it: --config.keep.rate=0.5
Told to stop by SIGTERM or Ctrl-C it saves and ends with code 75; the same command goes on from there.
"""

import os

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import commandline, parallel
from evit_jax.tokens.planned import read_planned
from evit_jax.training import loop
from evit_jax.training.run import follow
from evit_jax.training.stopping import Stopped

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/digits.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, pictures.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'Train (and evaluate at the end), or evaluate only.')
_PLAN = flags.DEFINE_string('plan', None, 'File of the planner (python -m evit_jax.plan): the tokens that stay, in '
                            'place of model.reduce_at, model.fuse, keep.rate and reducer.r.')
_ACCEPT = flags.DEFINE_bool('accept_changes', False, 'Continue a run although its config was another.')


def main() -> None:
    """Trains or evaluates the config in the workdir."""
    if _CONFIG.value is None or _WORKDIR.value is None:
        raise ValueError('give both --config FILE and --workdir DIR, as in: python -m evit_jax.main '
                         '--config configs/digits.py --workdir runs/digits')
    config = _CONFIG.value
    if _PLAN.value:
        config = follow(config, read_planned(_PLAN.value))
    _use_compilation_cache(config.compilation_cache)
    workdir = os.path.expanduser(_WORKDIR.value)
    with parallel.together(agreed=Stopped):
        if _MODE.value == 'train':
            loop.train(config, workdir, accept_changes=_ACCEPT.value)
        else:
            loop.evaluate_workdir(config, workdir)


def _use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


if __name__ == '__main__':
    commandline.run(main)
