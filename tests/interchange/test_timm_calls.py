"""The models of timm that calls begin with have the recorded configs."""

import dataclasses

from evit_jax.interchange import timm_calls
from tests.helpers import families


def test_timm_model_names_exist_and_have_the_config_of_the_table():
    free = ('layer_scale', 'prefix_positions', 'position_resize', 'projection')
    for name, config in timm_calls.MODELS.items():
        differing = families.differences(config, families.timm_table()['models'][name]['config'])
        assert not differing.keys() - free, (name, differing)


def test_code_lists_the_arguments_and_the_path():
    model = timm_calls.TimmModel('vit_tiny', {'img_size': [8, 16], 'act_layer': 'gelu'}, {})
    assert model.code('a.safetensors') == (
        "timm.create_model('vit_tiny', img_size=[8, 16], act_layer='gelu', checkpoint_path='a.safetensors')")


def test_timm_model_of_a_model_with_more_blocks_lists_only_the_difference():
    config = dataclasses.replace(timm_calls.MODELS['vit_small_patch16_dinov3'], depth=7)
    arrays = {'blocks.0.ls1.gamma': 'a'}
    model = timm_calls.timm_model(config, arrays)
    assert (model.name, model.arguments) == ('vit_small_patch16_dinov3', {'depth': 7})
    assert model.arrays == {'blocks.0.gamma_1': 'a'}
