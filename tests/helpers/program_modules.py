"""Imports program modules in the process of a test.

Programs define flags of the same names, so only one program module may be imported at a time.
"""

import contextlib
import importlib
import sys

import pytest
from absl import flags


def module_fixture(program):
    """Returns a fixture, for one test file, whose value is the module `evit_jax.<program>`."""

    @pytest.fixture(scope='module')
    def module():
        with load(program) as loaded:
            yield loaded

    return module


@contextlib.contextmanager
def load(program):
    """Imports `evit_jax.<program>` anew with its flags, and restores the flags of other programs at the end."""
    others = _program_flags()
    flags.FLAGS.remove_flag_values(others)
    sys.modules.pop(f'evit_jax.{program}', None)
    try:
        yield importlib.import_module(f'evit_jax.{program}')
    finally:
        flags.FLAGS.remove_flag_values(_program_flags())
        for name, (module, flag) in others.items():
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def _program_flags():
    """Returns the flags of the programs by name, each with the name of the module that defines it."""
    return {name: (module, flags.FLAGS[name]) for module, defined in flags.FLAGS.flags_by_module_dict().items()
            if module.startswith('evit_jax.') for name in (flag.name for flag in defined) if name in flags.FLAGS}
