"""Programs in a test's own process: their flags have the same names, so one is imported while no other's are there."""

import contextlib
import importlib

from absl import flags


def _ours():
    """The flags of programs, by name."""
    return {name: flags.FLAGS[name] for module, defined in flags.FLAGS.flags_by_module_dict().items()
            if module.startswith('evit_jax.') for name in (flag.name for flag in defined) if name in flags.FLAGS}


@contextlib.contextmanager
def alone(program):
    """Imports `evit_jax.<program>`, which no other test may do; puts the flags of others back at the end."""
    others = _ours()
    flags.FLAGS.remove_flag_values(others)
    try:
        yield importlib.import_module(f'evit_jax.{program}')
    finally:
        flags.FLAGS.remove_flag_values(_ours())
        for name, flag in others.items():
            flags.FLAGS[name] = flag
