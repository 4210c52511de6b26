"""Folders for timm and transformers have their names and configs, and are read back exactly."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.interchange import conversion, torch_weights
from evit_jax.interchange.pretrained_files import hugging_face_files, timm_files
from evit_jax.models import get_config
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig

TINY = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=3, position_resize='antialiased')
DINOV2 = dataclasses.replace(TINY, layer_scale=1e-5)
EVA02 = dataclasses.replace(TINY, k_bias=False, rope='eva', rope_grid=16, swiglu=True, activation='silu',
                            pooling='avg_fc_norm')
DINOV3 = dataclasses.replace(DINOV2, norm_epsilon=1e-5, registers=4, absolute_positions=False, qkv_bias=False,
                             rope='dinov3', rope_base=100.0, pooling='avg')
TIMM = {
    'deit_tiny_patch16_224': TINY, 'deit_tiny_distilled_patch16_224': dataclasses.replace(TINY, distilled=True),
    'deit3_small_patch16_224': dataclasses.replace(DINOV2, prefix_positions=0),
    'vit_small_patch14_reg4_dinov2': dataclasses.replace(DINOV2, registers=4, prefix_positions=0, classes=0),
    'vit_giant_patch14_dinov2': dataclasses.replace(DINOV2, swiglu=True, activation='silu'),
    'vit_base_patch16_clip_224': dataclasses.replace(TINY, norm_epsilon=1e-5, activation='quick_gelu', pre_norm=True,
                                                     patch_bias=False),
    'vit_base_patch16_siglip_224': dataclasses.replace(TINY, class_token=False, pooling='map', activation='gelu_tanh'),
    'vit_base_patch16_siglip_gap_224': dataclasses.replace(TINY, class_token=False, pooling='avg', registers=1),
    'eva02_tiny_patch14_224': EVA02,
    'eva02_base_patch14_224': dataclasses.replace(EVA02, mlp_norm=True),
    'eva_giant_patch14_224': dataclasses.replace(TINY, k_bias=False, pooling='avg_fc_norm'),
    'vit_small_patch16_dinov3': DINOV3,
    'vit_small_plus_patch16_dinov3': dataclasses.replace(DINOV3, swiglu=True, activation='silu', qkv_bias=True,
                                                         k_bias=False, pooling='token')}
HUGGING_FACE = {
    'ViTForImageClassification': dataclasses.replace(TINY, position_resize='bicubic', norm_epsilon=1e-12),
    'ViTModel': dataclasses.replace(TINY, position_resize='bicubic', classes=0, activation='gelu_tanh'),
    'DeiTForImageClassificationWithTeacher': dataclasses.replace(TINY, position_resize='bicubic', distilled=True),
    'DeiTForImageClassification': dataclasses.replace(TINY, position_resize='bicubic', distilled=True, one_head=True),
    'Dinov2Model': dataclasses.replace(DINOV2, position_resize='bicubic', classes=0),
    'Dinov2ForImageClassification': dataclasses.replace(DINOV2, position_resize='bicubic', pooling='token_avg'),
    'Dinov2WithRegistersModel': dataclasses.replace(DINOV2, registers=2, prefix_positions=1, classes=0)}


def loaded(config, **others):
    """Returns a model with random parameters."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), torch_weights.template(config))
    names = ('ant', 'bee', 'cat') if config.classes else ()
    model = LoadedModel('', 'custom', 0, params, config, names, config.image_size, (0.1,) * 3, (0.2,) * 3, 0.875,
                        'float32', None, interpolation='lanczos')
    return model._replace(**others)


def read_back(files, folder):
    """Writes the folder and reads it again."""
    folder.mkdir()
    save_file({key: np.ascontiguousarray(value) for key, value in files.arrays.items()}, folder / 'model.safetensors')
    for name, content in files.configs.items():
        (folder / name).write_text(json.dumps(content))
    return conversion.read_pretrained(folder)


@pytest.mark.parametrize('name', TIMM)
def test_timm_files_are_read_back_with_the_same_config_and_bits(tmp_path, name):
    model = loaded(TIMM[name])
    files = timm_files(model)
    assert files.configs['config.json']['architecture'] == name
    back = read_back(files, tmp_path / 'folder')
    assert dataclasses.replace(back.config, layer_scale=model.config.layer_scale) == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    data = back.metadata['config']['data']
    assert data == {'mean': (0.1,) * 3, 'std': (0.2,) * 3, 'eval_crop': 0.875, 'interpolation': 'lanczos'}
    assert tuple(back.metadata.get('class_names', ())) == model.class_names


@pytest.mark.parametrize('name', HUGGING_FACE)
def test_hugging_face_files_are_read_back_with_the_same_config_and_bits(tmp_path, name):
    model = loaded(HUGGING_FACE[name])
    files = hugging_face_files(model)
    assert files.configs['config.json']['architectures'] == [name] and name in files.code
    back = read_back(files, tmp_path / 'folder')
    assert dataclasses.replace(back.config, layer_scale=model.config.layer_scale) == model.config
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)
    data = back.metadata['config']['data']
    assert abs(data['eval_crop'] - 0.875) < 0.02 and data['interpolation'] == 'lanczos'  # 8 of 9 pixels


@pytest.mark.parametrize('name', ['ViTForImageClassification', 'DeiTForImageClassificationWithTeacher'])
def test_hugging_face_files_rectangle_without_a_crop_is_read_back(tmp_path, name):
    model = loaded(dataclasses.replace(HUGGING_FACE[name], image_size=(8, 16)), eval_crop=None, image_size=(8, 16))
    files = hugging_face_files(model)
    assert files.configs['config.json']['image_size'] == [8, 16]
    assert files.configs['preprocessor_config.json']['size'] == {'height': 8, 'width': 16}
    back = read_back(files, tmp_path / 'folder')
    assert back.config == model.config and not back.metadata['config']['data']['eval_crop']
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


def test_timm_files_at_another_image_size_resize_the_positions():
    files = timm_files(loaded(TINY, image_size=(16, 8)))
    assert files.arrays['pos_embed'].shape == (1, 1 + 8, 8)
    content = files.configs['config.json']
    assert content['pretrained_cfg']['input_size'] == [3, 16, 8] and content['model_args']['img_size'] == [16, 8]


def test_timm_files_position_of_the_class_token_alone_is_added_to_the_token():
    model = loaded(HUGGING_FACE['Dinov2WithRegistersModel'])
    arrays = timm_files(model).arrays
    assert arrays['pos_embed'].shape == (1, 4, 8)
    np.testing.assert_array_equal(arrays['cls_token'], model.params['cls_token'] + model.params['pos_embed'][:, :1])


def test_hugging_face_files_without_a_class_position_have_zeros():
    config = dataclasses.replace(DINOV2, registers=2, prefix_positions=0, classes=0)
    arrays = hugging_face_files(loaded(config)).arrays
    assert arrays['embeddings.position_embeddings'].shape == (1, 5, 8)
    assert not arrays['embeddings.position_embeddings'][:, 0].any()


@pytest.mark.parametrize('change, reason', [
    ({'norm_epsilon': 1e-12}, 'no model of timm has norm_epsilon=1e-12'),
    ({'distilled': True, 'one_head': True}, 'a distillation token without a head'),
    ({'pooling': 'token_avg'}, 'the mean of the patch tokens beside'), ({'rope': 'eva'}, 'a bias of the keys beside'),
    ({'activation': 'silu'}, 'the activation silu in an MLP without gates'),
    ({'patch_bias': False}, 'a patch projection without a bias')])
def test_timm_files_model_that_timm_lacks_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=f'cannot be written for timm: .*{reason}'):
        timm_files(loaded(dataclasses.replace(TINY, **change)))


def test_timm_files_lvvit_is_refused():
    config = LVViTConfig(image_size=8, patch_size=4, width=8, depth=4, heads=2, classes=3, stem_width=4)
    with pytest.raises(ValueError, match='timm has no model with the blocks of an LV-ViT'):
        timm_files(loaded(config))


@pytest.mark.parametrize('config, reason', [
    (EVA02, 'pooling avg_fc_norm'), (DINOV3, 'pooling avg'), (dataclasses.replace(TINY, pre_norm=True), 'norm before'),
    (dataclasses.replace(DINOV2, classes=0, image_size=(8, 16)), 'rectangular images'),
    (dataclasses.replace(TINY, image_size=(8, 16)), 'central crop of a rectangle'),
    (dataclasses.replace(DINOV2, classes=3), 'pooling token'), (dataclasses.replace(TINY, registers=1), 'registers')])
def test_hugging_face_files_model_that_transformers_lacks_is_refused_with_the_reason(config, reason):
    with pytest.raises(ValueError, match=f'cannot be written for transformers: its .* has no {reason}'):
        hugging_face_files(loaded(config))


@pytest.mark.parametrize('name', ['deit_t', 'deit_s', 'deit_b'])
def test_timm_files_named_model_needs_no_arguments(name):
    config = get_config(name)
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), torch_weights.template(config))
    content = timm_files(loaded(TINY)._replace(config=config, params=shapes, image_size=224)).configs['config.json']
    size = {'t': 'tiny', 's': 'small', 'b': 'base'}[name[-1]]
    assert (content['architecture'], content['model_args']) == (f'deit_{size}_patch16_224', {})
