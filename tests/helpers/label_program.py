"""Fixtures for tests of the program that writes label maps: a small digits data set, and the program."""

import sys

import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.data import sources, splits
from evit_jax.data.sources import DigitsSource
from evit_jax.data.sources import digits as builder
from tests.helpers import doors, layouts

SIZES = {'train': 40, 'test': 8}

label = doors.imported('label')


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
def run(capsys, monkeypatch, label):
    """Returns a function of the words of a command line that returns exit code and standard error."""

    def start(*words):
        monkeypatch.setattr(sys, 'argv', ['label', '--config=configs/digits.py', *map(str, words)])
        with flagsaver.flagsaver():
            try:
                code = cli.run(label.main, '[CHECKPOINT]')
            except SystemExit as end:
                code = end.code
        return code or 0, capsys.readouterr().err

    return start


def open_train():
    """Opens the training split."""
    return sources.open_source('digits', 'train')
