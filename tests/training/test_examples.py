"""The images of a picture are spread over the classes, and the same for any number of processes."""

import numpy as np
import pytest

from evit_jax.runtime import distributed
from evit_jax.training.examples import Examples


def batches(labels, size, first=0, rows=None, missing=()):
    """Yields rows `first` to `first + rows` of each batch of `size` images. An image is its position in the data."""
    labels = np.asarray(labels)
    for begin in range(0, len(labels), size):
        index = np.arange(begin + first, begin + first + (rows or size))
        index[index >= len(labels)] = -1
        yield {'index': index.astype(np.int32), 'label': np.where(index < 0, 0, labels[index]).astype(np.int32),
               'weight': np.array([float(i >= 0 and i not in missing) for i in index]), 'image': index.astype(np.int32)}


def collected(found, parts):
    for batch in parts:
        found.add({'image': batch['image'], 'label': batch['label'], 'kept': (batch['image'],)}, batch)
    return found


def chosen(labels, count, classes, size=4, **of_process):
    found = collected(Examples(count, classes), batches(labels, size, **of_process)).collect()
    return (found['image'].tolist(), found['label'].tolist()) if found else None


def test_examples_of_sorted_data_are_of_all_classes():
    assert chosen([0] * 30 + [1] * 30 + [2] * 30, 6, 3) == ([0, 1, 30, 31, 60, 61], [0, 0, 1, 1, 2, 2])


def test_examples_fewer_than_classes_are_of_evenly_spread_classes():
    assert chosen(np.repeat(np.arange(100), 3), 4, 100)[1] == [0, 33, 66, 99]


def test_examples_of_rare_and_missing_classes_are_filled_up_with_others():
    assert chosen([0] * 10 + [2], 4, 3)[1] == [0, 0, 0, 2]
    assert chosen([5, 5, 6], 2, 100)[1] == [5, 6]
    assert chosen([0, 1], 8, 2) == ([0, 1], [0, 1])


def test_examples_leave_out_padding_and_unreadable_images():
    assert chosen([1, 1, 1, 1, 1], 5, 2, missing=(0, 3))[0] == [1, 2, 4]
    assert chosen([1, 1, 1], 0, 2) is None


@pytest.mark.parametrize('order', ['sorted', 'mixed'])
def test_examples_are_the_same_for_any_number_of_processes(monkeypatch, order):
    labels = np.repeat(np.arange(5), (9, 1, 7, 3, 5))
    labels = labels if order == 'sorted' else np.random.default_rng(0).permutation(labels)
    want = chosen(labels, 6, 5, size=8)
    parts = [collected(Examples(6, 5), batches(labels, 8, first=4 * number, rows=4)) for number in range(2)]
    monkeypatch.setattr(distributed, 'is_single_process', lambda: False)
    sent = []
    monkeypatch.setattr(distributed, 'gather', lambda own: sent.append(own) or own)
    monkeypatch.setattr(distributed, 'broadcast', lambda arrays, sender: arrays)
    for part in parts:
        part.collect()
    monkeypatch.setattr(distributed, 'gather', lambda own: np.concatenate(sent))
    held = {row.index: row.arrays for part in parts for row in part._rows}
    for part in parts:
        index = iter(want[0])
        monkeypatch.setattr(distributed, 'broadcast', lambda arrays, sender: held[next(index)])  # noqa: B023, used in this turn
        found = part.collect()
        assert (found['image'].tolist(), found['label'].tolist()) == want
        assert found['kept'][0].tolist() == want[0]
