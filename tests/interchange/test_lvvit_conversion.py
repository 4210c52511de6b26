"""Checkpoints of the authors of LV-ViT are converted, resized, trained and evaluated, and converted back exactly."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.interchange import architecture, conversion, run_metadata, torch_weights
from evit_jax.models import create, get_config
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.training import loop
from tests.helpers import layouts
from tests.helpers.weights import random_params

SHAPE = LVViTConfig(image_size=16, patch_size=4, width=8, depth=4, heads=2, classes=3, stem_width=4)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'lvvit_toy', SHAPE)


def arrays_of(config=SHAPE):
    """Returns positive random arrays by the authors' names; every batch counter is 7."""
    rng, arrays = np.random.default_rng(0), torch_weights.to_torch(random_params(create(config)), config)
    arrays = {key: np.abs(rng.normal(size=value.shape)).astype(value.dtype) for key, value in arrays.items()}
    return arrays | {key: np.array(7) for key in arrays if key.endswith('num_batches_tracked')}


def write(path, arrays):
    save_file({key: np.asarray(value, order='C') for key, value in arrays.items()}, path)
    return path


def read(folder, config=SHAPE):
    return weights.read(folder, torch_weights.template(config))[0]


def test_to_torch_lvvit_has_the_names_of_its_authors():
    named = arrays_of()
    assert {'patch_embed.conv1.weight', 'patch_embed.bn3.running_mean', 'patch_embed.bn3.running_var', 'aux_head.bias',
            'patch_embed.bn3.num_batches_tracked', 'blocks.3.attn.qkv.weight'} < named.keys()
    assert 'blocks.0.attn.qkv.bias' not in named
    assert named['patch_embed.conv1.weight'].shape == (4, 3, 7, 7)
    assert named['patch_embed.proj.weight'].shape == (8, 4, 2, 2)


def test_to_safetensors_converted_lvvit_is_exact_but_for_batch_counters(tmp_path, caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        conversion.to_workdir(write(tmp_path / 'a.safetensors', arrays_of()), tmp_path / 'a')
    assert 'lvvit_toy, images of 16, 3 classes; layout LV-ViT; dtype float32' in caplog.text
    config = workdir.saved_config(tmp_path / 'a')
    assert config['model.name'] == 'lvvit_toy' and config['model.reduce_at'] == [1, 2, 3]
    conversion.to_safetensors(tmp_path / 'a', tmp_path / 'b.safetensors')
    back, want = load_file(tmp_path / 'b.safetensors'), arrays_of()
    assert back.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_array_equal(back[key], 0 if key.endswith('tracked') else value, err_msg=key)
        assert back[key].shape == value.shape and back[key].dtype == value.dtype
    conversion.to_workdir(tmp_path / 'b.safetensors', tmp_path / 'c')
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path / 'c'), read(tmp_path / 'a'))


def test_to_workdir_lvvit_at_another_image_size_resizes_positions_only(tmp_path):
    file = write(tmp_path / 'a.safetensors', arrays_of())
    conversion.to_workdir(file, tmp_path / 'a', image_size=24)
    assert workdir.saved_config(tmp_path / 'a')['model.image_size'] == 24
    params = read(tmp_path / 'a', dataclasses.replace(SHAPE, image_size=24))
    assert params['pos_embed'].shape == (1, 37, 8)
    np.testing.assert_array_equal(params['patch_embed']['bn2']['var'], arrays_of()['patch_embed.bn2.running_var'])


@pytest.mark.parametrize('name, crop', [('lvvit_t', 0.9), ('lvvit_s', 0.9), ('lvvit_m', 1.0)])
def test_default_settings_of_lvvit_are_those_of_its_authors(name, crop):
    settings = run_metadata.default_settings(name, get_config(name))
    assert settings['data.eval_crop'] == crop
    assert settings['model.reduce_at'] == get_config(name).default_reduce_at


def test_detect_lvvit_has_the_image_size_and_classes_of_its_arrays():
    shape = dataclasses.replace(SHAPE, image_size=32, classes=7)
    assert architecture.detect(arrays_of(shape), default_classes=3) == ('lvvit_toy', shape)


def test_detect_unsupported_lvvit_is_refused():
    arrays = arrays_of()
    for change, message in (({'blocks.4.norm1.bias': np.zeros(8)}, '5 blocks, an MLP of 24 and patches of 4'),
                         ({'patch_embed.conv1.weight': np.zeros((4, 3, 3, 3))}, 'none of these')):
        with pytest.raises(ValueError, match=message):
            architecture.detect(arrays | change, default_classes=3)
    del arrays['aux_head.weight']
    with pytest.raises(ValueError, match=r'1 problems\): missing aux_head.weight'):
        torch_weights.from_torch(arrays, SHAPE)


def test_to_workdir_lvvit_is_evaluated_and_trained_from(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    conversion.to_workdir(write(tmp_path / 'a.safetensors', arrays_of()), tmp_path / 'a')
    config = layouts.config_of(model__name='lvvit_toy')
    assert loop.evaluate_workdir(config, tmp_path / 'a')['loss'] > 0
    other = dataclasses.replace(SHAPE, classes=4)
    fresh = random_params(create(other), 2)
    started = weights.start_from(tmp_path / 'a', fresh, config=other, ema=False)
    for head in ('head', 'aux_head'):
        np.testing.assert_array_equal(started[head]['kernel'], fresh[head]['kernel'])
    np.testing.assert_array_equal(started['patch_embed']['bn1']['mean'], arrays_of()['patch_embed.bn1.running_mean'])
