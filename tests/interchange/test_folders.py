"""Folders of Hugging Face and timm: shards, the configs beside weights, and what keeps a folder from being one."""

import json
import logging
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.interchange import conversion, folders
from evit_jax.models.config import ViTConfig
from tests.helpers import layouts

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
    """A folder as save_pretrained makes it."""
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
    conversion.from_file(folder, tmp_path / 'out', **values)
    return load_model(tmp_path / 'out')


def test_a_folder_with_shards_becomes_the_model_of_its_configs(tmp_path, caplog):
    found = converted(write(tmp_path / 'hub'), tmp_path)
    config = found.config
    assert (config.heads, config.norm_epsilon, config.activation, config.pooling) == (4, 1e-3, 'quick_gelu', 'token')
    assert found.class_names == tuple(NAMES)
    assert (found.mean, found.std, found.eval_crop) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3), None)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    conversion.from_file(write(tmp_path / 'one', shards=0), tmp_path / 'again')
    again = load_model(tmp_path / 'again')
    assert again.shape == config
    np.testing.assert_array_equal(again.params['blocks'][1]['attn']['qkv']['kernel'],
                                  found.params['blocks'][1]['attn']['qkv']['kernel'])


@pytest.mark.parametrize(('resample', 'warned'), [(2, 'bilinear'), (3, ''), ('x', '')])
def test_from_file_with_another_resampling_warns(tmp_path, caplog, resample, warned):
    converted(write(tmp_path / 'hub', preprocessor=PREPROCESSOR | {'resample': resample}), tmp_path)
    assert ('resized by the filter bilinear' in caplog.text) == bool(warned)


def test_a_file_in_the_folder_is_read_with_the_configs_beside_it(tmp_path):
    found = converted(write(tmp_path / 'hub', shards=0) / 'model.safetensors', tmp_path)
    assert found.config.heads == 4 and found.class_names == tuple(NAMES)


def test_an_incomplete_config_has_the_defaults_of_its_model_type(tmp_path, caplog):
    config = {'model_type': 'vit', 'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}}
    found = converted(write(tmp_path / 'hub', config=config, preprocessor=None), tmp_path)
    assert found.config.norm_epsilon == 1e-12 and found.class_names == ('0', '1', '2', '3', '4')
    assert found.mean == (0.5,) * 3 and found.eval_crop is None
    assert "heads 2 (as vit_toy), mean 0.5,0.5,0.5 (as Hugging Face's ViT)" in caplog.text


@pytest.mark.parametrize('change, said', [
    (lambda folder: (folder / 'model-00002-of-00002.safetensors').unlink(), '00002.safetensors is not there'),
    (lambda folder: (folder / 'model-00002-of-00002.safetensors').write_bytes(
        (folder / 'model-00001-of-00002.safetensors').read_bytes()), 'do not fit each other'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text('{'), 'index.json is no JSON'),
    (lambda folder: (folder / 'model.safetensors.index.json').write_text('{"weight_map": {}}'), 'lists no shards'),
    (lambda folder: (folder / 'config.json').write_text('[1]'), 'config.json holds a list'),
    (lambda folder: (folder / 'model.safetensors.index.json').unlink(), 'nor a folder of Hugging Face .*give one of')])
def test_a_damaged_folder_is_refused(tmp_path, change, said):
    folder = write(tmp_path / 'hub')
    change(folder)
    with pytest.raises(ValueError, match=said):
        conversion.from_file(folder, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('path', ['../secret.safetensors', '/etc/passwd', 'a/../../b', 'sub/a.safetensors', '..\\a',
                                  '..', '', 7])
def test_an_index_names_files_of_its_own_folder_alone(tmp_path, path):
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': path}}))
    with pytest.raises(ValueError, match=r'no file of its folder|lists no shards'):
        conversion.from_file(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize('change, said', [
    ({'hidden_size': 16}, 'hidden_size=16, and the weights 8'), ({'model_type': 'beit'}, 'model type beit'),
    ({'hidden_act': 'relu'}, r'activation=relu \(hidden_act of config.json\) is not computed here'),
    ({'num_attention_heads': 3}, 'width of 8 cannot be divided among 3 heads: give one of 1, 2, 4, 8'),
    ({'id2label': {'0': 'ant', '1': 'bee'}}, '2 names for 5 classes')])
def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        converted(write(tmp_path / 'hub', config=CONFIG | change), tmp_path)


def test_class_names_of_numbers_become_text():
    assert folders.class_names({'id2label': {'0': 7, '1': 9}}) == ['7', '9']


@pytest.mark.parametrize('labels, said', [({'0': 'ant', '1': None}, 'names a class by a NoneType'),
                                          ({'1': 'ant', '2': 'bee'}, 'does not number its 2 classes from 0')])
def test_class_names_that_cannot_be_used_are_left_out_with_the_reason(caplog, labels, said):
    assert folders.class_names({'id2label': labels}) == [] and said in caplog.text


@pytest.mark.parametrize('name, argument', [('flax_model.msgpack', 'from_flax'), ('tf_model.h5', 'from_tf')])
def test_weights_in_folder_of_flax_or_tensorflow_names_the_file_and_the_way_out(tmp_path, name, argument):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf'its weights are in {name}, which is not read.*{argument}=True'):
        folders.weights_in(tmp_path)


def test_a_flag_wins_over_the_config_with_a_warning_that_names_both(tmp_path, caplog):
    found = converted(write(tmp_path / 'hub'), tmp_path, heads=8, mean=(0.1, 0.2, 0.3))
    assert found.config.heads == 8 and found.mean == (0.1, 0.2, 0.3)
    assert '--heads=8, though it is 4 by num_attention_heads of config.json: the flag wins' in caplog.text
    assert '--mean=0.1,0.2,0.3, though it is 0.5,0.4,0.3 by preprocessor_config.json' in caplog.text


def test_a_config_of_timm_gives_arguments_and_preprocessing(tmp_path):
    config = {'architecture': 'vit_toy', 'num_classes': 5, 'model_args': {'num_heads': 4, 'act_layer': 'gelu_tanh'},
              'global_pool': 'token', 'label_names': NAMES,
              'pretrained_cfg': {'mean': [0.5] * 3, 'std': [0.4] * 3, 'crop_pct': 0.95, 'crop_mode': 'center'}}
    (tmp_path / 'hub').mkdir()
    save_file(load_file(FILES / 'timm.safetensors'), tmp_path / 'hub' / 'model.safetensors')
    (tmp_path / 'hub' / 'config.json').write_text(json.dumps(config), encoding='utf-8-sig')
    found = converted(tmp_path / 'hub', tmp_path)
    assert (found.config.heads, found.config.activation, found.eval_crop) == (4, 'gelu_tanh', 0.95)
    assert found.std == (0.4,) * 3 and found.class_names == tuple(NAMES)


def test_the_config_of_a_run_is_none_of_hugging_face(tmp_path):
    workdir.write_config(tmp_path, {'config': {'model': {'name': 'vit_toy', 'heads': 4}}})
    assert folders.configs_beside(tmp_path / 'model.safetensors') == {}


def test_weights_of_another_program_are_no_start_of_a_run(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    folder = write(tmp_path / 'hub')
    (tmp_path / 'a.pth').write_bytes(b'PK')
    for path in (tmp_path / 'a.pth', tmp_path / 'none.safetensors', folder):
        with pytest.raises(ValueError, match=rf'{path.name}.*python -m evit_jax.convert .*{path.name} NEW_FOLDER'):
            weights.check_is_workdir('config.init_from', path)
        for changes in ({'init_from': str(path)}, {'teacher__path': str(path), 'distill__kind': 'self'}):
            with pytest.raises(ValueError, match=r'python -m evit_jax\.convert'):
                layouts.train_here(tmp_path / 'run', **changes)
