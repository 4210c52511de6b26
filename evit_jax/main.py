"""Trains or evaluates: python -m evit_jax.main --config configs/digits.py --workdir runs/digits

Any value of the config can be set behind it: --config.keep.rate=0.5
"""

import os
import sys

import jax
from absl import flags, logging
from ml_collections import config_flags

from evit_jax.training import loop

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/digits.py.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: checkpoints, metrics, pictures.')
_MODE = flags.DEFINE_enum('mode', 'train', ['train', 'evaluate'], 'Train (and evaluate at the end), or evaluate only.')
_ACCEPT = flags.DEFINE_bool('accept_changes', False, 'Continue a run although its config was another.')


def main() -> None:
    """Runs the program; errors that a user can mend end it with one line and exit code 2."""
    try:
        flags.FLAGS(sys.argv)
        if _CONFIG.value is None or _WORKDIR.value is None:
            raise ValueError('give both --config FILE and --workdir DIR, as in: python -m evit_jax.main '
                             '--config configs/digits.py --workdir runs/digits')
        _log_our_own_lines()
        _use_compilation_cache(_CONFIG.value.compilation_cache)
        if _MODE.value == 'train':
            loop.train(_CONFIG.value, _WORKDIR.value, accept_changes=_ACCEPT.value)
        else:
            loop.evaluate_workdir(_CONFIG.value, _WORKDIR.value)
    except (flags.Error, ValueError, KeyError, AttributeError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get('EVIT_JAX_TRACEBACK'):
            raise
        text = error.args[0] if error.args else error
        print(f'error: {" ".join(str(text).split())}', file=sys.stderr)
        sys.exit(2)


def _log_our_own_lines() -> None:
    """Ours from INFO on, of the libraries what is a warning: a save alone has 40 lines to say."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    package = os.path.dirname(os.path.abspath(__file__))
    logging.get_absl_handler().addFilter(
        lambda record: record.levelno >= logging.converter.STANDARD_WARNING or record.pathname.startswith(package))


def _use_compilation_cache(folder: str) -> None:
    if folder:
        jax.config.update('jax_compilation_cache_dir', os.path.expanduser(folder))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)


if __name__ == '__main__':
    main()
