"""Fixtures for tests of the program that writes label maps: a small digits data set, and the program."""

import functools

import pytest

from evit_jax.data import sources, splits
from evit_jax.data.sources import DigitsSource
from evit_jax.data.sources import digits as builder
from tests.helpers import layouts, program_modules, programs

SIZES = {'train': 40, 'test': 8}

label = program_modules.module_fixture('label')


@pytest.fixture(scope='module', autouse=True)
def digits(tmp_path_factory):
    """Replaces every data source by a small set of digits, and registers the smallest model."""
    path = tmp_path_factory.mktemp('digits')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, 'BANK', 80)
        layouts.prepare(patch)
        patch.setattr(sources, 'open_source', lambda name, split, **_: DigitsSource(
            path, splits.resolve(split, SIZES), SIZES))
        yield path


@pytest.fixture
def run(label):
    """Returns a function of the words of a command line that returns exit code and printed errors."""
    return functools.partial(programs.run, label, ('[CHECKPOINT]',), '--config=configs/digits.py')


def open_train():
    """Opens the training split."""
    return sources.open_source('digits', 'train')
