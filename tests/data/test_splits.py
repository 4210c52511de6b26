"""Tests of names and slices of splits."""

import pytest

from evit_jax.data import splits


@pytest.mark.parametrize('split, available, expected', [
    ('train', ['train', 'validation', 'test'], 'train'),
    ('auto', ['train', 'validation', 'test'], 'validation'),
    ('auto', ['train', 'val', 'test'], 'val'),
    ('auto', ['test', 'train'], 'test'),
    ('test', ['train', 'validation', 'val', 'test'], 'test'),
    ('val', ['train', 'validation', 'val', 'test'], 'val'),
    ('test', ['train', 'val'], 'test'),
    ('test', ['train'], 'test'),
    ('train', ['train'], 'train[:90%]'),
    ('auto', ['train'], 'train[90%:]'),
    ('test[:100%]', ['train', 'validation', 'test'], 'test[:100%]'),
    ('train[:100%]', ['train'], 'train[:100%]'),
    ('train[:80%]', ['train', 'test'], 'train[:80%]'),
])
def test_resolve_returns_a_split_that_the_data_has(split, available, expected):
    assert splits.resolve(split, available) == expected


@pytest.mark.parametrize('size', [1, 2, 7, 10, 99, 1001])
def test_slices_at_any_percentage_cover_the_split_once(size):
    for percent in range(0, 101, 9):
        slices = []
        for split in (f'a[:{percent}%]', f'a[{percent}%:]'):
            try:
                slices += splits.slices(split, {'a': size})
            except ValueError as error:
                assert 'holds no examples' in str(error)
        assert [i for each in slices for i in range(each.start, each.stop)] == list(range(size))


def test_overlap_counts_shared_examples():
    sizes = {'train': 100, 'test': 50}
    def shared(a, b):
        return splits.overlap(splits.slices(a, sizes), splits.slices(b, sizes))
    assert shared('train[:90%]', 'train[90%:]') == shared('train', 'test') == 0
    assert shared('train[:95%]', 'train[90%:]') == 5
    assert shared('train+test', 'test[10:20]') == 10
