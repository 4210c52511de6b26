"""Hugging Face and timm folders are converted with their shards and configs, or refused with the reason."""

import json
import logging
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.interchange import conversion, weight_files
from evit_jax.models.config import ViTConfig

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
SHAPE = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)
NAMES = ['ant', 'bee', 'cat', 'dog', 'eel']
CONFIG = {'model_type': 'vit', 'num_attention_heads': 4, 'layer_norm_eps': 1e-3, 'hidden_act': 'quick_gelu',
          'hidden_size': 8, 'num_hidden_layers': 2, 'patch_size': 4, 'image_size': 8,
          'id2label': {str(label): name for label, name in enumerate(NAMES)}}
PREPROCESSOR = {'image_mean': [0.5, 0.4, 0.3], 'image_std': [0.1, 0.2, 0.3], 'size': {'height': 8, 'width': 8}}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', SHAPE)


def write(folder, *, config=CONFIG, preprocessor=PREPROCESSOR, shards=2):
    """Writes a folder as `save_pretrained` of transformers does."""
    folder.mkdir()
    arrays = load_file(FILES / 'hugging_face_vit.safetensors')
    files = {}
    for number in range(shards):
        name = f'model-{number + 1:05d}-of-{shards:05d}.safetensors'
        part = {key: arrays[key] for key in sorted(arrays)[number::shards]}
        save_file(part, folder / name)
        files |= dict.fromkeys(part, name)
    if not shards:
        save_file(arrays, folder / 'model.safetensors')
    else:
        (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': files}))
    for name, content in (('config.json', config), ('preprocessor_config.json', preprocessor)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def converted(folder, tmp_path, **values):
    conversion.to_workdir(folder, tmp_path / 'out', **values)
    return load_model(tmp_path / 'out')


def test_to_workdir_folder_with_shards_uses_its_configs(tmp_path, caplog):
    model = converted(write(tmp_path / 'hub'), tmp_path)
    config = model.config
    assert (config.heads, config.norm_epsilon, config.activation, config.pooling) == (4, 1e-3, 'quick_gelu', 'token')
    assert model.class_names == tuple(NAMES)
    assert (model.mean, model.std, model.eval_crop) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), None)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    conversion.to_workdir(write(tmp_path / 'one', shards=0), tmp_path / 'again')
    again = load_model(tmp_path / 'again')
    assert again.config == config
    np.testing.assert_array_equal(again.params['blocks'][1]['attn']['qkv']['kernel'],
                                  model.params['blocks'][1]['attn']['qkv']['kernel'])


@pytest.mark.parametrize(('resample', 'expected'), [(2, 'bilinear'), (0, 'nearest'), (3, 'bicubic'), ('x', 'bicubic')])
def test_to_workdir_resampling_filter_is_recorded(tmp_path, resample, expected):
    model = converted(write(tmp_path / 'hub', preprocessor=PREPROCESSOR | {'resample': resample}), tmp_path)
    assert model.interpolation == model.eval_transform().interpolation == expected


def test_to_workdir_file_in_a_folder_uses_the_configs_beside_it(tmp_path):
    model = converted(write(tmp_path / 'hub', shards=0) / 'model.safetensors', tmp_path)
    assert model.config.heads == 4 and model.class_names == tuple(NAMES)


def test_to_workdir_incomplete_config_has_the_defaults_of_its_model_type(tmp_path, caplog):
    config = {'model_type': 'vit', 'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}}
    model = converted(write(tmp_path / 'hub', config=config, preprocessor=None), tmp_path)
    assert model.config.norm_epsilon == 1e-12 and model.class_names == ('0', '1', '2', '3', '4')
    assert model.mean == (0.5,) * 3 and model.eval_crop is None
    assert 'heads 2 (as vit_toy), mean 0.5,0.5,0.5 (as the image processor of vit)' in caplog.text


def test_to_workdir_config_that_contradicts_the_shapes_warns_and_gives_the_heads(tmp_path, caplog):
    model = converted(write(tmp_path / 'hub', config=CONFIG | {'hidden_size': 16, 'image_size': 32}), tmp_path)
    assert (model.config.width, model.config.image_size, model.config.heads) == (8, 8, 4)
    assert ('it has hidden_size 16, but the weights have 8; images of 32, but the weights have positions for 8. Its '
            'other values are used, such as the number of heads') in caplog.text


@pytest.mark.parametrize('change, message', [
    (lambda folder: (folder / 'model-00002-of-00002.safetensors').unlink(), '00002.safetensors is not there'),
    (lambda folder: (folder / 'model-00002-of-00002.safetensors').write_bytes(
        (folder / 'model-00001-of-00002.safetensors').read_bytes()), 'do not match'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text('{'), 'index.json is not JSON'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text('{"weight_map": {}}'), 'lists no shards'),
    (lambda folder: (folder / 'config.json').write_text('[1]'), 'config.json holds a list'),
    (lambda folder: (folder / 'model.safetensors.index.json').unlink(), 'nor a Hugging Face folder .*give one of')])
def test_to_workdir_damaged_folder_is_refused(tmp_path, change, message):
    folder = write(tmp_path / 'hub')
    change(folder)
    with pytest.raises(ValueError, match=message):
        conversion.to_workdir(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', ['../secret.safetensors', '/etc/passwd', 'a/../../b', 'sub/a.safetensors', '..\\a',
                                  '..', '', 7, 'a\0.safetensors', 'x' * 300])
def test_to_workdir_index_with_paths_outside_of_the_folder_is_refused(tmp_path, path):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': path}}))
    with pytest.raises(ValueError, match=r'no file of its folder|lists no shards'):
        conversion.to_workdir(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize('change, message', [
    ({'model_type': 'beit'}, r'this is a BEiT.*\(found model_type beit in config.json; wanted: a vision transformer'),
    ({'model_type': 'sam'}, 'model type sam, which is not supported: there are vit, deit, '),
    ({'hidden_act': 'relu'}, r'activation=relu \(hidden_act of config.json\) is not supported'),
    ({'num_attention_heads': 3}, r'heads=3 \(num_attention_heads of config.json\) does not divide the width of 8'),
    ({'id2label': {'0': 'ant', '1': 'bee'}}, '2 names for 5 classes')])
def test_to_workdir_config_of_another_model_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        converted(write(tmp_path / 'hub', config=CONFIG | change), tmp_path)


def test_class_names_numbers_become_text():
    assert weight_files.class_names({'id2label': {'0': 7, '1': 9}}) == ['7', '9']


@pytest.mark.parametrize('labels, message', [({'0': 'ant', '1': None}, 'names a class by a NoneType'),
                                          ({'1': 'ant', '2': 'bee'}, 'does not number its 2 classes from 0')])
def test_class_names_unusable_are_ignored_with_a_warning(caplog, labels, message):
    assert weight_files.class_names({'id2label': labels}) == [] and message in caplog.text


@pytest.mark.parametrize('name, argument', [('flax_model.msgpack', 'from_flax'), ('tf_model.h5', 'from_tf')])
def test_find_weights_flax_or_tensorflow_folder_names_the_way_out(tmp_path, name, argument):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf'its weights are in {name}, which is not supported.*{argument}=True'):
        weight_files.find_weights(tmp_path)


def test_to_workdir_flag_overrides_the_config_with_a_warning(tmp_path, caplog):
    model = converted(write(tmp_path / 'hub'), tmp_path, heads=8, mean=(0.1, 0.2, 0.3))
    assert model.config.heads == 8 and model.mean == (0.1, 0.2, 0.3)
    assert '--heads=8 overrides 4 (num_attention_heads of config.json)' in caplog.text
    assert '--mean=0.1,0.2,0.3 overrides 0.5,0.4,0.3 (preprocessor_config.json)' in caplog.text


def test_to_workdir_timm_config_gives_arguments_and_preprocessing(tmp_path):
    config = {'architecture': 'vit_toy', 'num_classes': 5, 'model_args': {'num_heads': 4, 'act_layer': 'gelu_tanh'},
              'global_pool': 'token', 'label_names': NAMES,
              'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.4] * 3, 'crop_pct': 0.95, 'crop_mode': 'center',
                                 'interpolation': 'bilinear'}}
    (tmp_path / 'hub').mkdir()
    save_file(load_file(FILES / 'timm.safetensors'), tmp_path / 'hub' / 'model.safetensors')
    (tmp_path / 'hub' / 'config.json').write_text(json.dumps(config), encoding='utf-8-sig')
    model = converted(tmp_path / 'hub', tmp_path)
    assert (model.config.heads, model.config.activation, model.eval_crop) == (4, 'gelu_tanh', 0.95)
    assert model.interpolation == 'bilinear'
    assert model.std == (0.4,) * 3 and model.class_names == tuple(NAMES)


def test_to_workdir_timm_config_that_contradicts_the_shapes_warns(tmp_path, caplog):
    config = {'architecture': 'vit_toy', 'num_classes': 9, 'model_args': {'num_heads': 4, 'embed_dim': 16, 'depth': 3}}
    (tmp_path / 'hub').mkdir()
    save_file(load_file(FILES / 'timm.safetensors'), tmp_path / 'hub' / 'model.safetensors')
    (tmp_path / 'hub' / 'config.json').write_text(json.dumps(config))
    model = converted(tmp_path / 'hub', tmp_path)
    assert (model.config.width, model.config.classes, model.config.heads) == (8, 5, 4)
    assert ('embed_dim 16, but the weights have 8; depth 3, but the weights have 2; num_classes 9, but the weights '
            'have 5') in caplog.text


def test_configs_beside_config_of_a_run_is_left_out(tmp_path):
    workdir.write_config(tmp_path, {'config': {'model': {'name': 'vit_toy', 'heads': 4}}})
    assert weight_files.read_configs(tmp_path / 'model.safetensors') == {}


def test_check_is_workdir_weights_of_another_program_are_refused_with_the_way_out(tmp_path):
    (tmp_path / 'a.pth').write_bytes(b'PK')
    for path in (tmp_path / 'a.pth', tmp_path / 'none.safetensors', write(tmp_path / 'hub')):
        with pytest.raises(ValueError, match=rf'{path.name}.*python -m evit_jax.convert .*{path.name} NEW_FOLDER'):
            weights.check_is_workdir('--workdir', path)
