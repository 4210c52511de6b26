"""Model configs by name, and the image sizes that they accept."""

import dataclasses

import pytest

from evit_jax.models import CONFIGS, get_config, image_size_keys, image_size_of


def test_get_config_with_a_misspelt_name_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'deits': did you mean deit_s\?"):
        get_config('deits')


def test_get_config_with_an_unknown_name_lists_all_models():
    with pytest.raises(ValueError, match=f"unknown model 'resnet50': there are {', '.join(CONFIGS)}"):
        get_config('resnet50')


@pytest.mark.parametrize('size, message', [
    (225, 'image size 225 is not divisible by the patch size 16: use 224 or 240'), (8, 'use 16$'), (0, 'use 16$')])
def test_image_size_that_is_no_multiple_of_the_patch_size_raises_with_the_nearest(size, message):
    with pytest.raises(ValueError, match=message):
        get_config('deit_s').patches(size)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(get_config('deit_s'), image_size=size)


@pytest.mark.parametrize(('keys', 'size'), [
    ({'model.image_size': 224}, 224), ({'model.image_size': 192, 'model.image_width': 384}, (192, 384)),
    ({'model.image_size': 224, 'model.image_width': 224}, 224), ({'model.image_size': [192, 384]}, (192, 384)),
    ({'model.image_size': 0}, None), ({}, None)])
def test_image_size_of_reads_a_square_or_a_rectangle(keys, size):
    assert image_size_of(keys) == size
    if size:
        assert image_size_of({f'model.{key}': value for key, value in image_size_keys(size).items()}) == size
