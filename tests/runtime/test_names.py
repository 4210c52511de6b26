"""`get_by_name` and the nearest name to a misspelt name."""

import pytest

from evit_jax.runtime.names import get_by_name, nearest_name

REDUCERS = {'evit': 1, 'tome': 2}


def test_get_by_name_returns_the_object():
    assert get_by_name('reducer', 'tome', REDUCERS) == 2


@pytest.mark.parametrize('name, hint', [('evlt', 'did you mean evit?'), ('xyz', 'there are evit, tome')])
def test_get_by_name_of_unknown_name_gives_the_nearest_or_all_names(name, hint):
    with pytest.raises(ValueError, match=rf"^unknown reducer '{name}': {hint}".replace('?', r'\?')):
        get_by_name('reducer', name, REDUCERS)


def test_nearest_name_below_the_cutoff_is_none():
    assert nearest_name('evlt', REDUCERS) == 'evit'
    assert nearest_name('evlt', REDUCERS, cutoff=0.9) is None
