"""Every vision transformer that timm registers is read with the values that timm computes with, or refused."""

import dataclasses
import functools
import json
import pathlib

import numpy as np
import pytest

from evit_jax.interchange import architecture, hyperparameters, names_timm, refusals, timm_calls, timm_models
from evit_jax.interchange.checkpoint_layouts import ModelWeights
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.models.config import ViTConfig, as_size

TABLE = pathlib.Path(__file__).parents[1] / 'golden' / 'families' / 'timm_models.json'  # recorded from timm
needs_table = pytest.mark.skipif(not TABLE.exists(), reason='the table of the models of timm is not recorded')


@functools.cache
def table():
    return json.loads(TABLE.read_text())


def recorded_config(name):
    """Returns the recorded config; its image size is rounded down to a multiple of the patch size."""
    fields = table()['models'][name]['config']
    patch, size = fields['patch_size'], fields['image_size']
    sides = [size, size] if isinstance(size, int) else size
    return ViTConfig(**fields | {'image_size': as_size([side // patch * patch for side in sides])})


def arrays_of(name):
    """Returns the arrays of the state dict, without values."""
    entry = table()['models'][name]
    return {key.replace('*', str(block)): LazyArray(tuple(shape), np.dtype(np.float32), lambda: None)
            for key, shape in table()['layouts'][entry['layout']].items()
            for block in range(entry['config']['depth'] if '*' in key else 1)}


@needs_table
def test_resolve_every_supported_model_of_timm_has_the_recorded_config():
    for name in [name for name, entry in table()['models'].items() if 'config' in entry]:
        arrays, layout = names_timm.from_timm(arrays_of(name))
        refusals.check_names([name])
        config_json = {'architecture': name}
        detected = architecture.detect(arrays, image_size=recorded_config(name).image_size)
        contents = hyperparameters.CheckpointContents(pathlib.Path('a'), {}, {}, {'config.json': config_json})
        config, _, _ = hyperparameters.resolve(*detected, ModelWeights(arrays, layout, {}, '.'), contents, {})
        want = recorded_config(name)
        assert bool(config.layer_scale) == bool(want.layer_scale)
        assert dataclasses.replace(config, layer_scale=want.layer_scale, projection=want.projection) == want, name


@needs_table
def test_refusals_every_unsupported_model_of_timm_is_refused_by_name():
    for name in [name for name, entry in table()['models'].items() if 'unsupported' in entry]:
        try:
            refusals.check_config({'architecture': name})
            refusals.check_names([name])
        except ValueError as error:
            assert str(error).startswith('this is ') and 'wanted: a vision transformer' in str(error)
        else:
            pytest.fail(f'{name} is not refused')


@needs_table
def test_is_projection_of_every_pretrained_tag_is_that_of_the_table():
    for name, entry in table()['models'].items():
        for tag, values in entry.get('tags', {}).items():
            want = entry['config'] | values.get('config', {})
            assert timm_models.is_projection(f'{name}.{tag}', want['classes']) == want['projection'], (name, tag)


@needs_table
def test_timm_model_names_exist_and_have_the_config_of_the_table():
    for name, config in timm_calls.MODELS.items():
        want = recorded_config(name)
        free = ('image_size', 'layer_scale', 'prefix_positions', 'position_resize', 'projection')
        assert dataclasses.replace(config, **{key: getattr(want, key) for key in free}) == want, name


@pytest.mark.parametrize('name, bare', [
    ('hf-hub:timm/vit_base_patch16_224.augreg_in21k', 'vit_base_patch16_224'), ('timm/deit_s', 'deit_s'),
    ('vit_small_patch14_dinov2.lvd142m', 'vit_small_patch14_dinov2')])
def test_bare_name_has_no_source_and_no_tag(name, bare):
    assert timm_models.bare_name(name) == bare


@pytest.mark.parametrize('name, width, heads', [
    ('', 384, 6), ('vit_so400m_patch14_siglip_384', 1152, 16), ('vit_giantopt_patch16_siglip_256', 1536, 16),
    ('vit_huge_plus_patch16_dinov3', 1280, 20), ('vit_huge_patch14_224', 1280, 16), ('', 100, 1)])
def test_default_heads_follow_the_width_and_the_name(name, width, heads):
    assert timm_models.default_heads(width, name) == heads


def test_facts_name_of_another_size_gives_no_heads():
    config = ViTConfig(width=64, heads=1)
    assert 'heads' not in timm_models.facts('vit_base_patch16_clip_quickgelu_224', config)
    assert timm_models.facts('vit_base_patch16_clip_quickgelu_224', config)['activation'] == 'quick_gelu'
    assert timm_models.facts('vit_small', config) == {} == timm_models.facts('resnet50', config)
