"""Trains:    python -m evit_jax.main --config digits --workdir runs/digits
Evaluates: python -m evit_jax.main --mode=evaluate --workdir runs/digits
By k-NN:   python -m evit_jax.main --mode=knn --workdir runs/knn --config.init_from=weights/dinov2_s \
               --config.data.source=folder --config.data.path=images

--config takes the name of a recipe or a Python file with get_config(). Flags after it override config keys, for example
--config.keep.rate=0.5. --helpkeys lists the keys.
An evaluation uses the config in the workdir. If --config FILE is given, it uses FILE for all keys except the model, the
image size, mean, std and crop.
--mode=knn classifies the test split by the nearest neighbours of its features in the training split (the gallery), as
DINO is evaluated; it needs no head and no training. The model is that of --config.init_from, or else of the workdir.
SIGTERM or Ctrl-C ends a training with a checkpoint and exit code 75. The same command resumes it.
"""

import functools
import os
import re
import sys

import jax
from absl import flags
from ml_collections import config_flags

from evit_jax import cli, config_errors
from evit_jax.checkpoints.workdir import flat
from evit_jax.inference import knn, knn_evaluation
from evit_jax.inference.model import VisionModel
from evit_jax.interchange.opening import open_model
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Name of a recipe (digits) or a Python file with '
                                          'get_config(). Default in an evaluation: the config of the run.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, pictures.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'knn'], 'Train (and evaluate at the end), evaluate '
                          'only, or evaluate features by k-NN.')
_PLAN = flags.DEFINE_string('plan', None, 'File with a token plan (python -m evit_jax.plan); it replaces '
                            'model.reduce_at, model.fuse, keep.rate and reducer.r; and reducer.name, if it names a '
                            'reducer.')
_OUT = flags.DEFINE_string('out', None, 'Evaluation: result file (a name that ends in .json) or a folder. The picture '
                           'is written to the same folder. Default: WORKDIR/evaluate-PLAN.json, or knn-PLAN.json.')
_GALLERY = flags.DEFINE_enum('gallery', 'same', ['same', 'dense'], 'k-NN: token plan of the gallery: the same as of '
                             'the queries, or dense.')
_K = flags.DEFINE_list('k', [str(count) for count in knn.K], 'k-NN: numbers of neighbours.')
_ACCEPT = flags.DEFINE_bool('accept_changes', False, 'Resume a run with another config than it began with.')


def run() -> None:
    """Starts the program. Adds a missing --config, which is needed to parse flags such as --config.keep.rate=0.5."""
    given = any(re.match(r'--?(config|flagfile)(=|$)', word) for word in sys.argv[1:])
    if not given:
        sys.argv.insert(1, f'--config={config_errors.BASE}')
    cli.run(functools.partial(main, from_file=given))


def main(*, from_file: bool = True) -> None:
    """Trains the config in the workdir, or evaluates the workdir.

    Args:
      from_file: True if the command line gives a config file.
    """
    mode, plan_file = _MODE.value, read_plan_file(_PLAN.value) if _PLAN.value else None
    config = _CONFIG.value
    if not _WORKDIR.value or config is None or not (from_file or mode != 'train'):
        raise ValueError('give both --config FILE and --workdir DIR, as in: python -m evit_jax.main '
                         '--config configs/digits.py --workdir runs/digits; --mode=evaluate needs --workdir alone')
    if _OUT.value and mode == 'train':
        raise ValueError(f'--out={_OUT.value} is for --mode=evaluate and knn: a training writes into its --workdir')
    _use_compilation_cache(config.compilation_cache)
    workdir = os.path.expanduser(_WORKDIR.value)
    explicit = config_flags.get_override_values(flags.FLAGS['config'])
    with distributed.distributed(collective_errors=Preempted):
        if mode == 'train':
            loop.train(config, workdir, accept_changes=_ACCEPT.value, plan_file=plan_file, explicit=explicit)
        elif mode == 'knn':
            _evaluate_knn(config, workdir, explicit, from_file, plan_file)
        else:
            loop.evaluate_workdir(config, workdir, explicit=explicit, from_file=from_file, plan_file=plan_file,
                                  out=_OUT.value)


def _evaluate_knn(config, workdir, explicit, from_file, plan_file):
    """Evaluates the features of the model in `config.init_from`, if it is set explicitly, else of the workdir."""
    k = cli.numbers('k', _K.value, int)
    model = VisionModel(open_model(config.init_from if 'init_from' in explicit else workdir, ema=config.init_ema))
    config = knn_evaluation.config_of(model, flat(config), explicit=explicit, from_file=from_file, plan_file=plan_file)
    out = _OUT.value or os.path.join(workdir, '')  # a folder, also with a dot in its name
    knn_evaluation.evaluate(model, config, out, k=k, dense_gallery=_GALLERY.value == 'dense')


def _use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


if __name__ == '__main__':
    run()
