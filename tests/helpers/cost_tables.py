"""Synthetic costs for the plan search, and a fixture that runs the plan program in the process of a test."""

import sys

import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.planning.cost_table import CostTable


def make_table(**changes):
    """Returns a table for a model of 16 patches and 2 blocks."""
    costs = {n: n / 10 for n in range(2, 18)}
    return CostTable(**{'key': {'depth': 2}, 'outside': 1.0, 'dense': None, 'attention': costs, 'mlp': costs,
                        'reduction': {'evit': {4: 0.1, 17: 0.2}}, 'last_block': {2: 0.3, 17: 0.6}, 'heads': {},
                        **changes})


@pytest.fixture
def run_plan(plan, capsys, monkeypatch):
    """A function that runs the plan program with flags and returns its exit code, stdout and stderr.

    The test file defines `plan = program_modules.module_fixture('plan')`.
    """
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['plan', *map(str, words)])
        with flagsaver.flagsaver():
            try:
                cli.run(plan.main)
                code = 0
            except SystemExit as error:
                code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run
