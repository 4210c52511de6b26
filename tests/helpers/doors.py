"""Programs in a test's own process: their flags have the same names, so one is imported while no other's are there."""

import contextlib
import importlib
import sys

import pytest
from absl import flags


def _ours():
    """The flags of programs by name, each with the module that defined it."""
    return {name: (module, flags.FLAGS[name]) for module, defined in flags.FLAGS.flags_by_module_dict().items()
            if module.startswith('evit_jax.') for name in (flag.name for flag in defined) if name in flags.FLAGS}


@contextlib.contextmanager
def alone(program):
    """Imports `evit_jax.<program>` anew, with its flags; restores the flags of other programs at the end."""
    others = _ours()
    flags.FLAGS.remove_flag_values(others)
    sys.modules.pop(f'evit_jax.{program}', None)
    try:
        yield importlib.import_module(f'evit_jax.{program}')
    finally:
        flags.FLAGS.remove_flag_values(_ours())
        for name, (module, flag) in others.items():
            flags.FLAGS[name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def imported(program):
    """A fixture: the program's module, for the time of a test file."""

    @pytest.fixture(scope='module')
    def module():
        with alone(program) as found:
            yield found

    return module
