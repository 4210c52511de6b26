"""Checkpoints of LV-ViT's authors become runs, are resized, begun from and evaluated, and go back without loss."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.interchange import conversion, detect, vit
from evit_jax.models import create, get_config
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.training import loop
from tests.helpers import layouts

SHAPE = LVViTConfig(image_size=16, patch_size=4, width=8, depth=4, heads=2, classes=3, stem_width=4)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'lvvit_toy', SHAPE)


def arrays_of(config=SHAPE):
    """By the authors' names; none is zero, no variance negative, batches were counted."""
    rng, found = np.random.default_rng(0), vit.to_torch(create(config).init(jax.random.key(0)), config)
    found = {key: np.abs(rng.normal(size=value.shape)).astype(value.dtype) for key, value in found.items()}
    return found | {key: np.array(7) for key, value in found.items() if key.endswith('num_batches_tracked')}


def write(path, arrays):
    save_file({key: np.asarray(value, order='C') for key, value in arrays.items()}, path)
    return path


def read(folder, config=SHAPE):
    return weights.read(folder, vit.template(config))[0]


def test_names_are_those_of_the_authors():
    named = arrays_of()
    assert {'patch_embed.conv1.weight', 'patch_embed.bn3.running_mean', 'patch_embed.bn3.running_var', 'aux_head.bias',
            'patch_embed.bn3.num_batches_tracked', 'blocks.3.attn.qkv.weight'} < named.keys()
    assert 'blocks.0.attn.qkv.bias' not in named
    assert named['patch_embed.conv1.weight'].shape == (4, 3, 7, 7)
    assert named['patch_embed.proj.weight'].shape == (8, 4, 2, 2)


def test_there_and_back_loses_no_bit_but_the_count_of_batches(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        conversion.from_file(write(tmp_path / 'a.safetensors', arrays_of()), tmp_path / 'a')
    assert 'lvvit_toy, images of 16, 3 classes; names of LV-ViT; values float32' in caplog.text
    config = workdir.saved_config(tmp_path / 'a')
    assert config['model.name'] == 'lvvit_toy' and config['model.reduce_at'] == [1, 2, 3]
    conversion.to_file(tmp_path / 'a', tmp_path / 'b.safetensors')
    back, want = load_file(tmp_path / 'b.safetensors'), arrays_of()
    assert back.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(back[key], 0 if key.endswith('tracked') else value, err_msg=key)
        assert back[key].shape == value.shape and back[key].dtype == value.dtype
    conversion.from_file(tmp_path / 'b.safetensors', tmp_path / 'c')
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / 'c'), read(tmp_path / 'a'))


def test_positions_are_resized_and_nothing_else(tmp_path):
    file = write(tmp_path / 'a.safetensors', arrays_of())
    conversion.from_file(file, tmp_path / 'a', image_size=24)
    assert workdir.saved_config(tmp_path / 'a')['model.image_size'] == 24
    params = read(tmp_path / 'a', dataclasses.replace(SHAPE, image_size=24))
    assert params['pos_embed'].shape == (1, 37, 8)
    np.testing.assert_array_equal(params['patch_embed']['bn2']['var'], arrays_of()['patch_embed.bn2.running_var'])


@pytest.mark.parametrize('name, crop', [('lvvit_t', 0.9), ('lvvit_s', 0.9), ('lvvit_m', 1.0)])
def test_evaluation_is_as_the_authors_have_it(name, crop):
    said = conversion.run_metadata.assumed(name, get_config(name))
    assert said['data.eval_crop'] == crop and said['model.reduce_at'] == get_config(name).default_reduce_at


def test_size_and_classes_are_told_from_the_shapes():
    shape = dataclasses.replace(SHAPE, image_size=32, classes=7)
    assert detect.detect(arrays_of(shape), classes=3) == ('lvvit_toy', shape)


def test_what_is_no_lvvit_here_is_said():
    arrays = arrays_of()
    for change, said in (({'blocks.4.norm1.bias': np.zeros(8)}, '5 blocks, an MLP of 24 and patches of 4'),
                         ({'patch_embed.conv1.weight': np.zeros((4, 3, 3, 3))}, 'none of these')):
        with pytest.raises(ValueError, match=said):
            detect.detect(arrays | change, classes=3)
    del arrays['aux_head.weight']
    with pytest.raises(ValueError, match=r'1 problems\): missing aux_head.weight'):
        vit.from_torch(arrays, SHAPE)


def test_converted_weights_are_evaluated_and_begun_from(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    conversion.from_file(write(tmp_path / 'a.safetensors', arrays_of()), tmp_path / 'a')
    config = layouts.config_of(model__name='lvvit_toy')
    assert loop.evaluate_workdir(config, tmp_path / 'a')['loss'] > 0
    other = dataclasses.replace(SHAPE, classes=4)
    fresh = create(other).init(jax.random.key(2))
    begun = weights.start_from(tmp_path / 'a', fresh, prefix=1, ema=False)
    for head in ('head', 'aux_head'):
        np.testing.assert_array_equal(begun[head]['kernel'], fresh[head]['kernel'])
    np.testing.assert_array_equal(begun['patch_embed']['bn1']['mean'], arrays_of()['patch_embed.bn1.running_mean'])
