"""Tests of the source of arrays."""

import pickle

import numpy as np
import pytest

from evit_jax.data.sources import ArraySource

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
LABELS = np.array([0, 1, 2, 2, 1, 0])


def test_array_source_returns_images_labels_and_unique_ids():
    source = ArraySource(IMAGES, LABELS, ['ape', 'bat', 'cat', 'dog'])
    assert len(source) == 6 and source.num_classes == 4 and source.class_names == ('ape', 'bat', 'cat', 'dog')
    assert source.image_size is None and ArraySource(IMAGES[:, :, :4], LABELS).image_size == 4
    for index in range(6):
        example = source[index]
        np.testing.assert_array_equal(example['image'], IMAGES[index])
        assert type(example['label']) is int and example['label'] == source.labels[index] == LABELS[index]
    assert len({source[index]['id'] for index in range(6)}) == 6
    for outside in (-1, 6):
        with pytest.raises(IndexError):
            source[outside]


def test_array_source_without_names_has_numbers():
    assert ArraySource(IMAGES, LABELS).class_names == ('0', '1', '2')


def test_array_source_pickled_is_the_same():
    source = ArraySource(IMAGES, LABELS)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint == source.fingerprint
    np.testing.assert_array_equal(copy[3]['image'], source[3]['image'])


@pytest.mark.parametrize('images, labels, names, message', [
    (IMAGES[..., 0], LABELS, (), r'shape \[6, 4, 5\]: give \[N, H, W, 3\]; repeat grey images'),
    (IMAGES.astype(np.float32) / 255, LABELS, (), 'type float32: give uint8'),
    (IMAGES[:0], LABELS[:0], (), r'shape \[0, 4, 5, 3\]'),
    (IMAGES, LABELS[:5], (), '6 images and 5 labels'),
    (IMAGES, LABELS[:, None], (), r'labels have shape \[6, 1\]'),
    (IMAGES, LABELS.astype(float), (), 'type float64: give integers'),
    (IMAGES, LABELS - 1, (), r'label -1 is outside \[0, 1\], the 2 classes'),
    (IMAGES, LABELS, ('ape', 'bat'), r'label 2 is outside \[0, 1\], the 2 classes'),
    (IMAGES, LABELS * 0, (), 'there is 1 class, and a model needs two or more'),
])
def test_array_source_invalid_arguments_raise(images, labels, names, message):
    with pytest.raises(ValueError, match=message):
        ArraySource(images, labels, names)
