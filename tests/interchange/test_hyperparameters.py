"""Hyperparameters that no array shape shows are read from a file and its folder, or assumed with a warning."""

import argparse
import logging
import pathlib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from evit_jax import models
from evit_jax.checkpoints.loaded import load_model
from evit_jax.interchange import conversion, hugging_face_models, hyperparameters, preprocessing
from evit_jax.interchange.checkpoint_layouts import ModelWeights
from evit_jax.interchange.restricted_pickle import InertObject
from evit_jax.models import create, get_config
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan import make_plan

FILES = pathlib.Path(__file__).parents[1] / 'golden_files'
SHAPE = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=2, classes=5)
PLAN = make_plan(4, 2, reduce_at=())


def compute(config, params, images):
    """Returns the logits and intermediates of a model."""
    return jax.jit(create(config).apply, static_argnums=2)(params, images, PLAN)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_toy', SHAPE)


def resolve(name='deit_s', *, tree=None, metadata=None, configs=None, flags=None, path='a.pth',
            weights_path='', layout='timm', arrays=()):
    """Returns the config, the config keys of the preprocessing, and the weights."""
    contents = hyperparameters.CheckpointContents(pathlib.Path(path), tree, metadata or {}, configs or {})
    weights = ModelWeights(dict.fromkeys(arrays), layout, {}, weights_path)
    return hyperparameters.resolve(name, get_config(name), weights, contents, flags or {})


def namespace(**values):
    return InertObject('argparse.Namespace', (), argparse.Namespace(**values).__dict__)


@pytest.mark.parametrize('source', [
    {'tree': {'args': namespace(num_heads=12)}}, {'tree': {'hyper_parameters': {'model': {'num_heads': 12}}}},
    {'tree': {'arch': 'vit_small'}}, {'weights_path': 'state_dict.module.base_encoder'},
    {'metadata': {'num_heads': '12'}},
    {'configs': {'config.json': {'num_attention_heads': 12}}}, {'flags': {'heads': 12}},
    {'configs': {'config.json': {'model_args': {'num_heads': 12}}}}, {'tree': {'hyper_parameters': {'n_heads': 12}}},
    {'tree': {'args': namespace(model='vit_small_patch16_224', model_kwargs={'num_heads': 12})}},
    {'tree': {'hyper_parameters': {'vit': {'num_heads': 12}, 'decoder': {'num_heads': 16}}}},
    {'tree': {'hyper_parameters': {'any': namespace(num_heads=16), 'model': {'num_heads': 12}}}}])
def test_resolve_heads_are_read_from_every_source(source):
    assert resolve(**source)[0].heads == 12


def test_resolve_arch_of_moco_is_an_assumption(caplog):
    assert resolve(tree={'arch': 'vit_small'})[0].heads == 12
    warning, = (record.getMessage() for record in caplog.records if record.levelname == 'WARNING')
    assert 'heads 12 (as MoCo v3, by arch vit_small)' in warning and '--heads' in warning


def test_resolve_missing_values_are_assumed_in_one_warning(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        config, settings, _ = resolve(tree={'args': namespace(num_heads=12, norm_eps=1e-5)})
    assert (config.heads, config.norm_epsilon) == (12, 1e-5)
    warned = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert len(warned) == 1 and 'heads' not in warned[0] and 'activation gelu (as deit_s)' in warned[0]
    assert 'heads 12 (num_heads of args in the file), norm_epsilon 1e-05 (norm_eps of args in the file)' in caplog.text
    assert settings['data.eval_crop'] == 0.875


@pytest.mark.parametrize('source, mean, crop', [
    ({'path': 'vit_small_patch16_224.augreg_in21k_ft_in1k.safetensors'}, 0.5, 0.9),
    ({'tree': {'arch': 'vit_small_patch16_384'}}, 0.5, 1.0),
    ({'path': 'deit_small_patch16_224-cd65a155.pth'}, 0.485, 0.875),
    ({'tree': {'args': namespace(model='deit_small_patch16_224')}}, 0.485, 0.875),
    ({'metadata': {'architecture': 'vit_small_patch16_224'}}, 0.5, 0.9), ({'path': 'mine.pth'}, 0.485, 0.875),
    ({'path': 'vit_small_patch16_224.dino.safetensors'}, 0.485, 0.875), ({'layout': 'Hugging Face'}, 0.5, 0.0),
    ({'path': 'vit_small_patch16_224.pth', 'flags': {'mean': (0.1, 0.1, 0.1), 'crop': 0.5}}, 0.1, 0.5),
    ({'path': 'vit_small_patch16_224.pth', 'configs': {'preprocessor_config.json': {
        'image_mean': [0.2] * 3, 'size': 256, 'crop_size': {'height': 192}, 'do_center_crop': True}}}, 0.2, 0.75)])
def test_resolve_preprocessing_is_of_the_configs_else_of_the_model_family(source, mean, crop):
    _, settings, _ = resolve(**source)
    assert settings['data.mean'][0] == mean and settings['data.eval_crop'] == crop


@pytest.mark.parametrize('config, mean, std', [
    ({'do_normalize': False}, 0, 1), ({'do_rescale': False, 'image_mean': [51] * 3, 'image_std': [102] * 3}, 0.2, 0.4),
    ({'rescale_factor': 2 / 255, 'image_mean': [1] * 3, 'image_std': [1] * 3}, 0.5, 0.5)])
def test_of_preprocessor_rescale_factor_is_part_of_mean_and_std(config, mean, std):
    values = preprocessing.of_preprocessor(config, 'it')
    np.testing.assert_allclose((values['mean'].value[0], values['std'].value[0]), (mean, std), atol=1e-6)


def test_of_preprocessor_without_resizing_gives_no_crop():
    size = {'size': {'height': 8, 'width': 8}}
    assert preprocessing.of_preprocessor(size, 'it')['crop'].value == 0
    assert 'crop' not in preprocessing.of_preprocessor(size | {'do_resize': False}, 'it')


@pytest.mark.parametrize('values', [
    {'flags': {'mean': (123.675, 116.28, 103.53)}}, {'flags': {'std': (58.4, 57.1, 57.4)}},
    {'configs': {'preprocessor_config.json': {'image_mean': [127.5] * 3}}}, {'flags': {'mean': (-0.1, 0, 0)}}])
def test_resolve_mean_or_std_of_another_pixel_scale_is_refused(values):
    with pytest.raises(ValueError, match=r'pixels are in 0\.\.1, so divide values of 0\.\.255 by 255'):
        resolve(**values)


def test_resolve_crop_ratio_of_deit_arguments_is_read():
    assert resolve(tree={'args': namespace(eval_crop_ratio=1.0)})[1]['data.eval_crop'] == 1


@pytest.mark.parametrize('source', [{'tree': {'arch': 'vit_small'}}, {'weights_path': 'module.base_encoder'}])
def test_resolve_names_of_moco_at_another_width_leave_the_heads(source):
    assert resolve('deit_t', **source)[0].heads == 3


@pytest.mark.parametrize('value', [None, 'six', True, [6], {'a': 1}, 6.5])
def test_resolve_value_of_another_type_is_ignored(value):
    assert resolve(tree={'args': namespace(num_heads=value)})[0].heads == 6
    assert resolve(tree={'args': namespace(mean=value, norm_eps=10**400)})[1]['data.mean'][0] == 0.485


def test_resolve_recursive_settings_are_read():
    tree = {'args': {'num_heads': 12}}
    tree['args'] |= {f'{number}': tree['args'] for number in range(100)} | {'config': tree['args']}
    assert resolve(tree=tree)[0].heads == 12


@pytest.mark.parametrize('inner', [{'a': {'num_heads': 12}, 'b': {'num_heads': 4}}, {'class_to_idx': {'heads': 12}}])
def test_resolve_contradicting_or_unrelated_dicts_give_no_value(inner, caplog):
    assert resolve(tree={'hyper_parameters': inner})[0].heads == 6
    assert 'assumed' in caplog.text and '--heads' in caplog.text


def test_resolve_contradictions_are_logged(caplog):
    resolve(tree={'args': namespace(num_heads=12)}, configs={'config.json': {'num_heads': 6}}, flags={'heads': 4})
    assert 'heads is 12 (num_heads of args in the file), but 6 (num_heads of config.json): took the' in caplog.text
    assert '--heads=4 overrides 12 (num_heads of args in the file)' in caplog.text


@pytest.mark.parametrize('flags, message', [
    ({'heads': 5}, r'heads=5 \(--heads\) does not divide the width of 384'), ({'heads': 0}, 'heads=0'),
    ({'norm_epsilon': 0.0}, r'norm_epsilon=0 is outside \(0, 1\)'), ({'crop': 1.5}, r'crop=1.5 \(--crop\) is outside'),
    ({'norm_epsilon': float('nan')}, 'norm_epsilon=nan'), ({'activation': 'relu'}, 'activation=relu'),
    ({'std': (1, 0, 1)}, 'std=1,0,1'), ({'pooling': 'avg_fc_norm'}, 'is for weights with fc_norm in place of norm')])
def test_resolve_value_out_of_range_is_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        resolve(flags=flags)


@pytest.mark.parametrize('value, message', [
    ('max', 'is not supported'), ('avgmax', 'is not supported'), ('map', r'is for weights with attn_pool\.\*'),
    ('token_avg', 'is for weights whose head has 768 inputs')])
def test_resolve_unsupported_pooling_is_refused(value, message):
    with pytest.raises(ValueError, match=rf'pooling={value} \(global_pool of args in the file\) {message}'):
        resolve(tree={'args': namespace(global_pool=value)})


@pytest.mark.parametrize('value, arrays, pooling, norm', [
    (True, ['fc_norm.weight'], 'avg_fc_norm', 'fc_norm.weight'), ('avg', ['norm.weight'], 'avg', 'norm.weight'),
    (None, ['fc_norm.weight'], 'avg_fc_norm', 'fc_norm.weight'), ('token', ['fc_norm.weight'], 'token', 'norm.weight'),
    (False, ['norm.weight'], 'token', 'norm.weight'), ('', ['norm.weight'], 'token', 'norm.weight')])
def test_resolve_pooling_follows_arguments_and_norms(value, arrays, pooling, norm):
    config, _, weights = resolve(tree={'args': namespace(global_pool=value)}, arrays=arrays)
    assert config.pooling == pooling and [*weights.arrays] == [norm]


def test_to_workdir_file_of_this_project_keeps_its_values_without_a_warning(tmp_path, caplog):
    conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / 'a', heads=4, norm_epsilon=1e-4,
                          activation='gelu_tanh', pooling='avg', mean=(0.1,) * 3, std=(0.2,) * 3, crop=0.9)
    conversion.to_safetensors(tmp_path / 'a', tmp_path / 'b.safetensors')
    caplog.clear()
    conversion.to_workdir(tmp_path / 'b.safetensors', tmp_path / 'c')
    first, again = (load_model(tmp_path / name) for name in 'ac')
    assert first.config == again.config and first.config.heads == 4 and first.config.pooling == 'avg'
    assert (again.mean, again.std, again.eval_crop) == ((0.1,) * 3, (0.2,) * 3, 0.9)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_to_workdir_heads_change_the_logits(tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    logits = {}
    for heads in (2, 4):
        conversion.to_workdir(FILES / 'timm.safetensors', tmp_path / str(heads), heads=heads)
        model = load_model(tmp_path / str(heads))
        logits[heads] = np.asarray(compute(model.config, model.params, images)[0])
    assert np.abs(logits[2] - logits[4]).max() > 1e-2
    config = ViTConfig(image_size=8, patch_size=4, width=8, depth=2, heads=4, classes=5)
    np.testing.assert_allclose(compute(config, model.params, images)[0], logits[4], atol=1e-6)


def test_to_workdir_distilled_model_with_one_head_survives_a_round_trip(tmp_path, caplog):
    arrays = load_file(FILES / 'hugging_face_deit.safetensors')
    one = {key.replace('cls_classifier', 'classifier'): value for key, value in arrays.items()
           if not key.startswith('distillation_classifier')}
    save_file(one, tmp_path / 'a.safetensors')
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'a')
    conversion.to_workdir(FILES / 'hugging_face_deit.safetensors', tmp_path / 'two')
    model, two = load_model(tmp_path / 'a'), load_model(tmp_path / 'two')
    assert model.config.one_head and model.config.distilled and 'head_dist' not in model.params
    images = np.ones((1, 8, 8, 3), np.float32)
    logits, _ = compute(model.config, model.params, images)
    _, outputs = compute(two.config, two.params, images)
    np.testing.assert_allclose(logits, outputs['cls_logits'], atol=1e-6)
    assert "only the head of the class token gives logits" in caplog.text
    conversion.to_safetensors(tmp_path / 'a', tmp_path / 'b.safetensors')
    conversion.to_workdir(tmp_path / 'b.safetensors', tmp_path / 'c')
    assert load_model(tmp_path / 'c').config == model.config


@pytest.mark.parametrize('fields, model_type, epsilon, mean', [
    ({}, 'vit', 1e-12, 0.5), ({'layer_scale': 1.0}, 'dinov2', 1e-6, 0.485),
    ({'layer_scale': 1.0, 'registers': 4}, 'dinov2_with_registers', 1e-6, 0.485),
    ({'layer_scale': 1.0, 'registers': 4, 'absolute_positions': False}, 'dinov3_vit', 1e-5, 0.485),
    ({'pre_norm': True}, 'clip', 1e-5, 0.48145466), ({'distilled': True}, 'deit', 1e-12, 0.485),
    ({'class_token': False, 'pooling': 'map'}, 'siglip', 1e-6, 0.5)])
def test_defaults_without_a_config_are_those_of_the_likely_model_type(fields, model_type, epsilon, mean):
    config = ViTConfig(**fields)
    contents = hyperparameters.CheckpointContents(pathlib.Path('a'), {}, {}, {})
    defaults = hyperparameters._defaults('custom', config, ModelWeights({}, 'Hugging Face', {}, '.'), contents)
    assert hugging_face_models.likely_type(config) == model_type
    assert (defaults['norm_epsilon'].value, defaults['mean'].value[0]) == (epsilon, mean)
