"""Runs a program in the process of a test, as with a command line."""

import contextlib
import io
import sys

import pytest
from absl.testing import flagsaver

from evit_jax import cli


def run(program, operands, *words):
    """Runs the `main` of a program module that `program_modules` has loaded.

    Args:
      program: the module.
      operands: names of its operands, as it passes them to `cli.run`.
      words: the command line.

    Returns:
      Exit code, and the errors that were printed.
    """
    errors, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver(), contextlib.redirect_stderr(errors):
        patch.setattr(sys, 'argv', [program.__name__, *map(str, words)])
        patch.setattr(cli, 'configure_logging', lambda: None)
        try:
            cli.run(program.main, *operands)
        except SystemExit as end:
            code = end.code
    return code, errors.getvalue().strip()
