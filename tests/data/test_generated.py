"""Tests of generated images."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from evit_jax.data import sources
from evit_jax.data.sources.generated import GeneratedSource


def generated(**changes):
    return sources.open_source('generated', **{'split': 'train', 'path': '', 'image_size': 32, 'num_classes': 5,
                                               'seed': 0} | changes)


def test_generated_images_depend_on_seed_split_and_index():
    image = generated()[4]['image']
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, generated()[4]['image'])
    for other in (generated(seed=1)[4], generated(split='test')[4], generated()[5]):
        assert (image != other['image']).any()
    assert len({generated()[i]['id'] for i in range(20)}) == 20
    assert len(generated(split='train[:17]')) == 17
    with pytest.raises(IndexError):
        generated(split='train[:17]')[17]


def test_generated_images_have_spectra_that_identify_the_class():
    """The nearest class centre of the spectra, which do not depend on the phase, gives the class."""
    examples = [generated()[i] for i in range(120)]
    spectra = np.array([np.abs(np.fft.fft2(e['image'], axes=(0, 1))).ravel() for e in examples])
    truth = np.array([e['label'] for e in examples])
    assert set(truth) == set(range(5))
    centres = np.array([spectra[:60][truth[:60] == label].mean(0) for label in range(5)])
    guess = ((spectra[60:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (guess == truth[60:]).mean() > 0.9


def encoded(**changes):
    return GeneratedSource(**{'split': 'train', 'image_size': 8, 'num_classes': 5, 'encoded': (500, 375), 'size': 40}
                           | changes)


def test_generated_encoded_images_have_the_size_of_photographs():
    source = encoded()
    pictures = {source[i]['image'] for i in range(40)}
    assert 1 < len(pictures) <= 10
    assert source.image_size is None
    for picture in pictures:
        assert simplejpeg.decode_jpeg(picture, 'RGB').shape == (375, 500, 3)
        assert 80_000 < len(picture) < 140_000
    assert {source[i]['id'] for i in range(40)} == {encoded(encoded=None)[i]['id'] for i in range(40)}
    assert {source[i]['label'] for i in range(40)} == set(range(5))


def test_generated_encoded_images_are_smooth_like_photographs():
    """Amplitudes fall with frequency: octave by octave, the power of neighbouring differences grows with distance."""
    pixels = np.asarray(Image.open(io.BytesIO(encoded()[0]['image'])).convert('L')).astype(float)
    power = [np.mean((pixels[:, step:] - pixels[:, :-step]) ** 2) for step in (1, 4, 16, 64)]
    assert power == sorted(power) and power[3] > 4 * power[0]


def test_generated_encoded_images_depend_on_the_seed():
    assert encoded()[3]['image'] == encoded()[3]['image'] != encoded(seed=1)[3]['image']
    assert encoded(encoded=(40, 30))[0]['image'] != encoded()[0]['image']


def test_generated_encoded_images_of_width_0_raise():
    with pytest.raises(ValueError, match=r'encoded=\(0, 10\)'):
        encoded(encoded=(0, 10))
