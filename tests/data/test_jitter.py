"""Tests of the augmentation of the digits."""

import itertools

import numpy as np

from evit_jax.data.transforms import geometry


def test_jitter_shift_reflects_the_border():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), 'reflect')
    windows = {padded[y:y + 9, x:x + 7, order].tobytes()
               for y in range(7) for x in range(7) for order in itertools.permutations(range(3))}
    seen = {geometry.jitter(image, np.random.default_rng(i), shift=3, contrast=0, brightness=0).tobytes()
            for i in range(400)}
    assert seen <= windows
    assert len(seen) > 150


def test_jitter_same_generator_returns_the_same_image_in_range():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    first, second = (geometry.jitter(image, np.random.default_rng(3), shift=2, brightness=200) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape and first.dtype == np.uint8
    for i in range(20):  # all pixels move in the same direction; none wraps around
        one = geometry.jitter(image, np.random.default_rng(i), shift=0, contrast=0, brightness=255)
        change = np.sort(one.astype(int), -1) - np.sort(image.astype(int), -1)
        assert (change >= 0).all() or (change <= 0).all()
