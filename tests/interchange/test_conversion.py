"""Files of other programs are converted to workdirs that are evaluated and trained from, and back exactly."""

import dataclasses
import json
import logging
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints import model_config, weights, workdir
from evit_jax.interchange import conversion, torch_weights
from evit_jax.models import create
from evit_jax.models.config import ViTConfig
from evit_jax.training import loop
from tests.helpers import layouts
from tests.helpers.weights import random_params

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
SHAPE = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', SHAPE)


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        yield caplog


def arrays_of(name='timm.safetensors'):
    return {key: value.astype(np.float32) for key, value in load_file(FILES / name).items()}


def altered(path, **changes):
    """Writes the toy model with some arrays replaced, or removed (None)."""
    arrays = arrays_of() | {key.replace('__', '.'): value for key, value in changes.items()}
    save_file({key: value for key, value in arrays.items() if value is not None}, path)
    return path


def metadata_of(path):
    content = path.read_bytes()
    return json.loads(content[8:8 + int.from_bytes(content[:8], 'little')])['__metadata__']


def read(folder, config=SHAPE):
    return weights.read(folder, torch_weights.template(config))[0]


def test_to_workdir_file_becomes_a_workdir_with_its_config(tmp_path, log):
    conversion.to_workdir(FILES / 'evit.pth', tmp_path / 'new' / 'folder')
    config = workdir.saved_config(tmp_path / 'new' / 'folder')
    stored = model_config.from_json(config.pop('model_config'))
    assert stored == dataclasses.replace(SHAPE, distilled=True)
    assert config == {
        'base_model': 'evit.pth', 'model.name': 'vit_toy', 'model.image_size': 8, 'model.classes': 5,
        'model.distilled': True, 'model.reduce_at': [0, 1], 'model.fuse': True, 'reducer.name': 'evit',
        'keep.rate': 0.7,
        'model.heads': 2, 'model.norm_epsilon': 1e-6, 'model.activation': 'gelu', 'model.pooling': 'token',
        'model.one_head': False, 'data.eval_crop': 0.875, 'data.mean': [0.485, 0.456, 0.406],
        'data.std': [0.229, 0.224, 0.225], 'data.interpolation': 'bicubic'}
    assert 'evit.pth: vit_toy, images of 8, 5 classes, distilled; layout timm; dtype float32' in log.text
    assert 'keep.rate' not in log.text
    warned = [record.getMessage() for record in log.records if record.levelname == 'WARNING']
    assert len(warned) == 1 and 'so they are assumed: activation gelu (as vit_toy), crop 0.875 (as DeiT), ' in warned[0]
    assert 'heads 2 (as vit_toy)' in warned[0] and 'norm_epsilon 1e-06' in warned[0] and '--heads' in warned[0]


def test_read_pretrained_file_returns_the_model_and_writes_nothing(tmp_path):
    shutil.copy(FILES / 'evit.pth', tmp_path / 'a.pth')
    name, config, params, metadata = conversion.read_pretrained(tmp_path / 'a.pth', heads=4)
    assert (name, config.heads, config.distilled) == ('vit_toy', 4, True)
    assert metadata['config']['model']['heads'] == 4 and 'class_names' not in metadata
    assert os.listdir(tmp_path) == ['a.pth']
    conversion.to_workdir(tmp_path / 'a.pth', tmp_path / 'a', heads=4)
    jax.tree.map(np.testing.assert_array_equal, params, read(tmp_path / 'a', config))


def test_to_workdir_ema_converts_the_average(tmp_path):
    for ema in (False, True):
        conversion.to_workdir(FILES / 'evit.pth', tmp_path / f'{ema}', ema=ema)
    shape = dataclasses.replace(SHAPE, distilled=True)
    params, average = read(tmp_path / 'False', shape), read(tmp_path / 'True', shape)
    jax.tree.map(lambda value, half: np.testing.assert_array_equal(value / 2, half), params, average)


def test_to_safetensors_and_back_is_exact_and_keeps_the_config(tmp_path, log):
    names = tmp_path / 'names.txt'
    names.write_text('ant\nbee\ncat \ndog\neel\n')
    conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'a', class_names=names, mean=(0.5,) * 3,
                          std=(0.1,) * 3)
    conversion.to_safetensors(tmp_path / 'a', tmp_path / 'b.safetensors')
    conversion.to_workdir(tmp_path / 'b.safetensors', tmp_path / 'c')
    conversion.to_safetensors(tmp_path / 'c', tmp_path / 'd.safetensors')
    want = arrays_of()
    for back in (load_file(tmp_path / 'b.safetensors'), load_file(tmp_path / 'd.safetensors')):
        assert back.keys() == want.keys()
        for key, value in want.items():
            assert back[key].dtype == np.float32 and back[key].tobytes() == value.tobytes(), key
    assert metadata_of(tmp_path / 'b.safetensors') == metadata_of(tmp_path / 'd.safetensors')
    config = workdir.saved_config(tmp_path / 'c')
    assert config == workdir.saved_config(tmp_path / 'a')
    assert config['class_names'] == ['ant', 'bee', 'cat', 'dog', 'eel'] and config['data.std'] == [0.1] * 3
    assert 'dtype float16 converted to float32' in log.text
    assert "in timm: timm.create_model('deit_tiny_patch16_224', " in log.text


def test_to_safetensors_logs_the_call_that_loads_it_in_timm(tmp_path, log, monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'deit_s', SHAPE)
    shape = dataclasses.replace(SHAPE, distilled=True)
    weights.save(tmp_path / 'a', random_params(create(shape)),
                 {'config': {'model': {'name': 'deit_s', 'image_size': 8, 'classes': 5, 'distilled': True}}})
    conversion.to_safetensors(tmp_path / 'a', tmp_path / 'b.safetensors')
    metadata = metadata_of(tmp_path / 'b.safetensors')
    assert metadata['format'] == 'pt' and 'architecture' not in metadata  # its width is not that of a name
    assert ("timm.create_model('deit_tiny_distilled_patch16_224', img_size=8, patch_size=4, embed_dim=8, depth=2, "
            f"num_heads=2, num_classes=5, checkpoint_path='{tmp_path / 'b.safetensors'}')") in log.text


def test_conversions_image_size_resizes_the_position_embeddings(tmp_path):
    conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'a', image_size=16)
    assert workdir.saved_config(tmp_path / 'a')['model.image_size'] == 16
    large = read(tmp_path / 'a', dataclasses.replace(SHAPE, image_size=16))
    conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'b')
    small = read(tmp_path / 'b')
    assert large['pos_embed'].shape == (1, 17, 8)
    np.testing.assert_array_equal(large['pos_embed'][:, 0], small['pos_embed'][:, 0])
    np.testing.assert_allclose(large['pos_embed'][0, 1:].mean(0), small['pos_embed'][0, 1:].mean(0), rtol=1e-5)
    conversion.to_safetensors(tmp_path / 'b', tmp_path / 'c.safetensors', image_size=16)
    np.testing.assert_array_equal(load_file(tmp_path / 'c.safetensors')['pos_embed'], large['pos_embed'])
    with pytest.raises(ValueError, match='image size 18 is not divisible by the patch size 4'):
        conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'd', image_size=18)


def test_to_workdir_arrays_that_do_not_fit_are_listed(tmp_path, log):
    file = altered(tmp_path / 'a.safetensors', norm__bias=None, head__bias=np.zeros(7, np.float32),
                   fc_norm__weight=np.ones(8, np.float32))
    with pytest.raises(ValueError, match=r'a\.safetensors: weights do not fit the model \(3 problems\): '
                                         r'head\.bias has shape \(7,\), wanted \(5,\); missing norm\.bias; '
                                         r'unknown fc_norm\.weight'):
        conversion.to_workdir(file, tmp_path / 'new')
    file = altered(tmp_path / 'b.safetensors', norm__bias=None, fc_norm__weight=np.ones(8, np.float32))
    with pytest.raises(ValueError, match=r'\(2 problems\): missing norm.bias; unknown fc_norm.*fc_norm.weight, '
                                         'norm.bias cannot be left out'):
        conversion.to_workdir(file, tmp_path / 'new', allow_missing=['*.bias'], allow_extra=['fc_*'])
    assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('key', ['blocks.1.ls1.gamma', 'blocks.1.attn.q_norm.weight', 'vit.encoder.layer.0.scale',
                                 'pre_logits.fc.weight', 'layer_scale'])
def test_to_workdir_extra_backbone_weights_cannot_be_allowed(tmp_path, key):
    file = altered(tmp_path / 'a.safetensors', **{key: np.ones(8, np.float32)})
    with pytest.raises(ValueError, match=rf'unknown {key}. {key} cannot be left out'):
        conversion.to_workdir(file, tmp_path / 'new', allow_extra=['*'])


@pytest.mark.parametrize('key', ['norm_pre.weight', 'blocks.0.attn.q_norm.weight'])
def test_to_workdir_part_of_an_architecture_is_refused_with_the_missing_arrays(tmp_path, key):
    file = altered(tmp_path / 'a.safetensors', **{key: np.ones(8 if 'pre' in key else 4, np.float32)})
    with pytest.raises(ValueError, match=rf'missing {key.rpartition(".")[0]}.bias'):
        conversion.to_workdir(file, tmp_path / 'new', allow_extra=['*'])


@pytest.mark.parametrize('key, message', [
    ('pos_embed', 'no position embeddings.*give --rope=eva'), ('cls_token', '5 positions, which are not those of 0'),
    *((key, f'missing {key}. {key} cannot be left out') for key in ('blocks.1.mlp.fc2.bias', 'patch_embed.proj.bias')),
    ('blocks.0.mlp.fc2.weight', 'no blocks.0.mlp.fc2.weight among')])
def test_to_workdir_missing_backbone_weights_cannot_be_allowed(tmp_path, key, message):
    file = altered(tmp_path / 'a.safetensors', **{key: None})
    with pytest.raises(ValueError, match=message):
        conversion.to_workdir(file, tmp_path / 'new', allow_missing=['*'])


def test_to_workdir_unused_extra_weights_names_the_flag(tmp_path):
    pooler = {f'vit__pooler__dense__{part}': np.ones(8, np.float32) for part in ('weight', 'bias')}
    file = altered(tmp_path / 'a.safetensors', **pooler)
    with pytest.raises(ValueError, match=r"\(2 problems\).*, give --allow_extra='vit\.pooler\.dense\.\*'$"):
        conversion.to_workdir(file, tmp_path / 'new')
    conversion.to_workdir(file, tmp_path / 'new', allow_extra=['vit.pooler.dense.*'])


def test_to_workdir_allowed_missing_and_extra_weights_warn(tmp_path, log):
    file = altered(tmp_path / 'a.safetensors', head__bias=None, head__weight=None, mask_token=np.ones(8, np.float32),
                   pooler__dense__weight=np.ones((8, 8), np.float32), decoder_norm__weight=np.ones(8, np.float32))
    conversion.to_workdir(file, tmp_path / 'new', allow_missing=['head.*'], allow_extra=['*'])
    warned = ' '.join(record.getMessage() for record in log.records if record.levelname == 'WARNING')
    assert 'initialised at random, as they are missing: head.bias, head.weight. Predictions of this' in warned
    assert 'left out, as the model has no such arrays: decoder_norm.weight, mask_token, pooler.dense.weight' in warned


def test_conversions_nan_or_infinity_is_refused_with_the_arrays(tmp_path):
    broken = np.ones(8, np.float32)
    broken[[1, 3]] = np.nan, np.inf
    file = altered(tmp_path / 'a.safetensors', norm__bias=broken, head__bias=np.full(5, 1e300))
    message = r'in 2 of \d+ arrays: head.bias \(5 of 5 values\), norm.bias \(2 of 8 values\)'
    with pytest.raises(ValueError, match=message):
        conversion.to_workdir(file, tmp_path / 'new')
    params = random_params(create(SHAPE))
    params['head']['kernel'] = np.asarray(params['head']['kernel']).copy()
    params['head']['kernel'][2, 3] = np.nan
    weights.save(tmp_path / 'run', params, {'config': {'model': {'name': 'vit_toy', 'classes': 5}}})
    with pytest.raises(ValueError, match=r'run: NaN or infinity stands in 1 of \d+ arrays: head.weight \(1 of 40'):
        conversion.to_safetensors(tmp_path / 'run', tmp_path / 'b.safetensors')
    assert {*os.listdir(tmp_path)} == {'a.safetensors', 'run'}


def test_to_workdir_class_names_accept_a_byte_order_mark(tmp_path):
    (tmp_path / 'names.txt').write_bytes('\ufeffant\r\nbee\r\nc\u2028t\r\ndog\r\neel\r\n'.encode())
    conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'new', class_names=tmp_path / 'names.txt')
    assert workdir.saved_config(tmp_path / 'new')['class_names'] == ['ant', 'bee', 'c\u2028t', 'dog', 'eel']
    (tmp_path / 'names.txt').write_bytes('ant'.encode('utf-16'))
    with pytest.raises(ValueError, match=r'names.txt is not in UTF-8'):
        conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'other', class_names=tmp_path / 'names.txt')


def test_to_workdir_missing_head_is_created_for_the_class_names(tmp_path):
    file = altered(tmp_path / 'a.safetensors', head__weight=None, head__bias=None)
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    conversion.to_workdir(file, tmp_path / 'new', class_names=tmp_path / 'names.txt', allow_missing=['head.*'])
    assert workdir.saved_config(tmp_path / 'new')['model.classes'] == 2


@pytest.mark.parametrize('content', ['[]', '7', '{'])
def test_saved_config_not_a_dict_is_refused(tmp_path, content):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(ValueError, match=r'config\.json (holds|is no JSON).*: restore it, or give another folder$'):
        workdir.saved_config(tmp_path)


def test_conversions_refused_input_leaves_no_files(tmp_path, monkeypatch):
    (tmp_path / 'names.txt').write_text('ant\n\nbee\n')
    (tmp_path / 'text.pth').write_text('hello, these are no weights')
    (tmp_path / 'empty.pth').write_text('')
    (tmp_path / 'torn.safetensors').write_bytes((FILES / 'timm.safetensors').read_bytes()[:-9])
    (tmp_path / 'folder').mkdir()
    toy = FILES / 'timm.safetensors'
    for src, dst, options, message in (
            (tmp_path / 'none.pth', 'a', {}, 'none.pth does not exist'),
            (toy, 'folder', {}, 'folder exists, and is not overwritten'),
            (toy, 'a.safetensors', {}, 'is the name of a file'),
            (tmp_path / 'text.pth', 'a', {}, "begins with b'hello, t'"),
            (tmp_path / 'empty.pth', 'a', {}, 'empty.pth is empty'),
            (FILES / 'legacy.pth', 'a', {}, 'before version 1.6'),
            (tmp_path / 'torn.safetensors', 'a', {}, 'torn.safetensors is cut off or damaged'),
            (FILES / 'containers.pth', 'a', {}, r'not the weights of a vision transformer.*among 1 arrays \(parameter'),
            (toy, 'a', {'ema': True}, 'no moving average'),
            (toy, 'a', {'class_names': tmp_path / 'names.txt'}, 'names.txt has an empty line')):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            conversion.to_workdir(src, tmp_path / dst, **options)
    (tmp_path / 'names.txt').write_text('ant\nbee\n')
    with pytest.raises(ValueError, match='2 names for 5 classes'):
        conversion.to_workdir(toy, tmp_path / 'a', class_names=tmp_path / 'names.txt')
    conversion.to_workdir(toy, tmp_path / 'run')
    for src, dst, options, message in (
            (tmp_path / 'run', 'b', {}, 'a local file name that ends in .safetensors'),
            (tmp_path / 'folder', 'b.safetensors', {}, 'is not the workdir of a run'),
            (tmp_path / 'run', 'torn.safetensors', {}, 'exists, and is not overwritten'),
            (tmp_path / 'run', 'b.safetensors', {'ema': True}, 'kept no moving average: leave out --ema')):
        with pytest.raises(ValueError, match=message):
            conversion.to_safetensors(src, tmp_path / dst, **options)

    def full(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(weights, 'save', full)
    with pytest.raises(ValueError, match=r'cannot be written \(No space left on device\): free space there'):
        conversion.to_workdir(toy, tmp_path / 'a')
    assert not {'a', 'b', 'b.safetensors', 'a.safetensors'} & {*os.listdir(tmp_path)}


def test_to_workdir_result_is_evaluated_and_trained_from(tmp_path, monkeypatch, log):
    layouts.prepare(monkeypatch)
    shape = dataclasses.replace(layouts.SHAPE, classes=3)
    params = random_params(create(shape), 1)
    save_file({key: np.ascontiguousarray(value) for key, value in torch_weights.to_torch(params, shape).items()},
              tmp_path / 'a.safetensors')
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'a')
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / 'a', shape), params)
    assert loop.evaluate_workdir(layouts.config_of(), tmp_path / 'a')['loss'] > 0  # without class names
    config = dataclasses.replace(shape, classes=4)
    other = random_params(create(config), 2)
    started = weights.start_from(tmp_path / 'a', other, config=config, ema=False)
    np.testing.assert_array_equal(started['norm']['bias'], params['norm']['bias'])
    assert 'fresh for other classes: head.bias, head.kernel' in log.text


def test_read_pretrained_unknown_hyperparameter_is_refused():
    with pytest.raises(TypeError, match='head is not a hyperparameter: there are heads, '):
        conversion.read_pretrained(FILES / 'timm.safetensors', head=4)
