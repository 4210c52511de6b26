"""Tests of digit pairs."""

import pickle

import numpy as np
import pytest

from evit_jax.data import sources
from evit_jax.data.sources import digit_pairs, digits
from evit_jax.data.sources.digit_pairs import CELL, GRID, SHIFT, DigitPairsSource


def cells_of(image):
    """Returns the cells [36, 8, 8] of a square image [48, 48]."""
    return image.reshape(GRID, CELL, GRID, CELL).swapaxes(1, 2).reshape(GRID * GRID, CELL, CELL)


def read(cell):
    """Returns the index of the source digit that resembles the cell most, at any shift."""
    images = np.pad(digits.source_digits()[0].astype(float), ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT)))
    steps = range(2 * SHIFT + 1)
    shifted = np.stack([images[:, top:top + CELL, left:left + CELL] for top in steps for left in steps])
    shifted = shifted.reshape(-1, CELL * CELL)
    shifted -= shifted.mean(1, keepdims=True)
    similarity = shifted @ (cell - cell.mean()).ravel() / np.linalg.norm(shifted, axis=1)
    return similarity.argmax() % len(images)


def cells_and_mask(example):
    """Returns the cells [36, 64] of an example, and whether the mask covers each of them."""
    cells = cells_of(example['image'][..., 0].astype(float)).reshape(GRID * GRID, -1)
    mask = cells_of(example['mask']).reshape(GRID * GRID, -1)
    assert set(map(tuple, mask[:, [0, -1]].tolist())) == {(0, 0), (255, 255)}
    return cells, mask.all(1)


def test_digit_pair_has_two_masked_cells_and_the_label_of_the_larger_digit():
    source, num_correct = sources.open_source('digit_pairs', 'test[:60]'), 0
    for example in (source[index] for index in range(len(source))):
        assert example['image'].shape == (48, 48, 3) and example['image'].dtype == np.uint8
        assert (example['image'] == example['image'][..., :1]).all()
        cells, mask = cells_and_mask(example)
        assert mask.sum() == 2
        num_correct += max(digits.source_digits()[1][read(cell)] for cell in cells[mask]) == example['label']
    assert num_correct >= 54  # noise hides the others


@pytest.mark.parametrize('split', ['train', 'test'])
def test_digit_pair_without_noise_has_digits_of_its_split_and_twelve_fainter_cells(split, monkeypatch):
    monkeypatch.setattr(digit_pairs, 'NOISE', 0)
    monkeypatch.setattr(digit_pairs, 'SHIFT', 0)
    for index in range(20):
        cells, mask = cells_and_mask(DigitPairsSource(split)[index])
        assert all(read(cell) in digits.split_digits(split) for cell in cells[mask])
        brightest = cells.max(1) - digit_pairs.GROUND
        assert (brightest > 0).sum() == 2 + digit_pairs.PIECES
        assert brightest[~mask].max() <= 0.5 * digit_pairs.INK < brightest[mask].min()


def test_digit_pairs_depend_on_split_and_index_only():
    train, test = DigitPairsSource('train'), DigitPairsSource('test')
    np.testing.assert_array_equal(train[7]['image'], DigitPairsSource('train', 8)[7]['image'])
    for other in (train[8], test[7]):
        assert (other['image'] != train[7]['image']).any()
    assert len({train[index]['id'] for index in range(20)} | {test[0]['id']}) == 21
    labels = np.bincount([train[index]['label'] for index in range(300)], minlength=10)
    assert labels[9] > labels[4] > labels[0]  # the larger of two digits is 9 in 19 %, and 0 in 1 % of the images


def test_clutter_has_the_quadrants_of_a_digit_in_another_order():
    digit = np.arange(64, dtype=np.float32).reshape(1, CELL, CELL)

    def quadrants(image):
        return [image[top:top + 4, left:left + 4].tobytes() for top in (0, 4) for left in (0, 4)]

    orders = {tuple(quadrants(digit_pairs._clutter(np.random.default_rng(seed), digit)[0])) for seed in range(20)}
    assert len(orders) > 5 and all(sorted(order) == sorted(quadrants(digit[0] / 2)) for order in orders)


def test_digit_pairs_open_by_name_and_refuse_wrong_requests():
    assert len(sources.open_source('digit_pairs', 'train', num_classes=10)) == 153_600
    assert sources.open_source('digit_pairs', 'auto').split == 'test'
    source = sources.open_source('digit_pairs', 'train[:640]')
    assert len(source) == 640 and source.fingerprint != DigitPairsSource('train').fingerprint
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint
    with pytest.raises(IndexError):
        source[640]
    for split, classes, message in (('train[640:]', 0, 'are cut at the end only'), ('val', 0, "no split 'val'"),
                                    ('train', 5, "num_classes=5, but source 'digit_pairs' has 10")):
        with pytest.raises(ValueError, match=message):
            sources.open_source('digit_pairs', split, num_classes=classes)
