"""Generated images, and sources that there are not."""

import numpy as np
import pytest

from evit_jax.data import sources


def generated(**changes):
    return sources.open_source('generated', **{'split': 'train', 'path': '', 'image_size': 32, 'num_classes': 5,
                                               'seed': 0} | changes)


def test_generated_images_are_a_function_of_seed_split_and_index():
    image = generated()[4]['image']
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, generated()[4]['image'])
    for other in (generated(seed=1)[4], generated(split='test')[4], generated()[5]):
        assert (image != other['image']).any()
    assert len({generated()[i]['id'] for i in range(20)}) == 20
    assert len(generated(split='train[:17]')) == 17
    with pytest.raises(IndexError):
        generated(split='train[:17]')[17]


def test_generated_images_tell_their_class():
    """The nearest class centre of spectra, which no phase changes, names the class far above chance."""
    examples = [generated()[i] for i in range(120)]
    spectra = np.array([np.abs(np.fft.fft2(e['image'], axes=(0, 1))).ravel() for e in examples])
    truth = np.array([e['label'] for e in examples])
    assert set(truth) == set(range(5))
    centres = np.array([spectra[:60][truth[:60] == label].mean(0) for label in range(5)])
    guess = ((spectra[60:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (guess == truth[60:]).mean() > 0.9


@pytest.mark.parametrize('changes, message', [
    ({'name': 'digist'}, "unknown source 'digist'; did you mean 'digits'"),
    ({'name': 'cifar'}, 'there are digits, generated'),
    ({'split': 'validation'}, "no split 'validation' .there are train, test"),
    ({'num_classes': 1000}, "num_classes=1000, but source 'digits' has 10"),
    ({'name': 'generated', 'image_size': 0}, 'image_size=0'),
])
def test_wrong_sources_are_refused_before_any_build(tmp_path, changes, message):
    arguments = {'name': 'digits', 'split': 'train', 'path': tmp_path, 'image_size': 64, 'num_classes': 10} | changes
    with pytest.raises(ValueError, match=message):
        sources.open_source(**arguments)
    assert not list(tmp_path.iterdir())
