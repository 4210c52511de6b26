"""The check that the data has the classes of the model, in the same order."""

import types

import pytest

from evit_jax.inference import held_out
from tests.helpers import tiny

NAMES = 'red', 'green', 'blue'


def check(monkeypatch, ours, theirs=NAMES, recorded=NAMES):
    loaded = tiny.model(class_names=theirs).loaded._replace(path='runs/a')
    monkeypatch.setattr(held_out, 'read_metadata', lambda path: {'class_names': recorded})
    held_out.check_classes(loaded, types.SimpleNamespace(class_names=ours, num_classes=len(ours)))


@pytest.mark.parametrize('ours, message', [
    (('red', 'blue', 'green'), "'green' is its class 1, 'blue' that of the data: give a model"),
    (('cat', 'dog', 'owl'), "'red' is its class 0, 'cat' that of the data"),
    (('red', 'green'), 'has 3 classes, the data have 2: give a model')])
def test_check_classes_with_other_classes_names_both(monkeypatch, ours, message):
    with pytest.raises(ValueError, match=f'the model in runs/a .*{message}'):
        check(monkeypatch, ours)


def test_check_classes_with_the_same_classes_does_not_warn(monkeypatch, caplog):
    check(monkeypatch, NAMES)
    assert 'class names' not in caplog.text


def test_check_classes_compares_numbers_if_they_are_recorded(monkeypatch, caplog):
    check(monkeypatch, NAMES, theirs=('0', '1', '2'), recorded=[])
    assert 'the weights in runs/a have no class names: their classes are assumed to be those of the data' in caplog.text
    with pytest.raises(ValueError, match="'0' is its class 0, 'red' that of the data"):
        check(monkeypatch, NAMES, theirs=('0', '1', '2'), recorded=('0', '1', '2'))
