"""Fixtures for tests of exported models: a checkpoint with random weights, and the export program."""

import functools

import pytest

from evit_jax.checkpoints import weights
from tests.helpers import layouts, program_modules, programs
from tests.helpers.weights import random_params

NAMES = 'red', 'grün', 'blue'

export = program_modules.module_fixture('export')


def save_random_weights(folder, seed=1, names=NAMES, **config):
    """Writes random weights of three classes as a checkpoint."""
    run = layouts.setup(**config)
    weights.save(folder, random_params(run.model, seed), run.metadata | {'class_names': names})
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A checkpoint with random weights and a keep rate of 0.75 at the first block."""
    return save_random_weights(tmp_path_factory.mktemp('weights'), keep__rate=0.75, model__reduce_at=(0,))


@pytest.fixture(scope='module')
def run(export):
    """Returns a function of the words of a command line that returns exit code and printed errors."""
    return functools.partial(programs.run, export, ('CHECKPOINT', 'DIR'))
