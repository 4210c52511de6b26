"""Runs whose model is that of the initial weights, and the recipe configs/finetune.py."""

import dataclasses
import json

import numpy as np
import pytest

import evit_jax
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.checkpoints.workdir import flat
from evit_jax.configs import finetune
from evit_jax.models.config import ViTConfig
from evit_jax.training import initial_model, inputs, loop, optimizer
from tests.helpers import fake_hub, layouts, published
from tests.helpers.folders import draw_stripes

MODEL = ViTConfig(image_size=32, patch_size=8, width=16, depth=4, heads=2, classes=5, init_std=0.2, mlp_ratio=3.0)
PREPROCESSING = {'mean': (0.5, 0.4, 0.3), 'std': (0.2, 0.2, 0.3), 'eval_crop': 0.9}


@pytest.fixture(scope='module')
def pretrained(tmp_path_factory):
    """A folder of weights of a model that has no name."""
    folder = tmp_path_factory.mktemp('weights') / 'custom'
    model = evit_jax.create_model(MODEL, keep_rate=1.0)
    evit_jax.VisionModel(model.loaded._replace(**PREPROCESSING)).save(folder)
    return folder


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp('images'))


def recipe(init_from, images='', **changes):
    config = finetune.get_config()
    config.update_from_flattened_dict({
        'init_from': init_from and str(init_from), 'data.path': str(images), 'data.workers': 0, 'compilation_cache': '',
        'batch_size': 8, 'epochs': 2, 'optimizer.lr': 1e-2, 'log.pictures': 0} | {
        key.replace('__', '.'): value for key, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def finetuned(pretrained, images, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('finetuned')
    return workdir, loop.train(recipe(pretrained, images), workdir)


def saved(workdir):
    return json.loads((workdir / 'config.json').read_text())


def test_finetune_takes_model_and_preprocessing_of_the_weights(pretrained, finetuned):
    workdir, metrics = finetuned
    config = saved(workdir)
    assert model_configs.saved_in(config) == dataclasses.replace(MODEL, classes=2)
    assert (config['model.name'], config['model.image_size'], config['model.classes']) == ('custom', 32, 2)
    assert config['model.reduce_at'] == [1, 2, 3]
    assert [tuple(config[f'data.{key}']) for key in ('mean', 'std')] == [PREPROCESSING['mean'], PREPROCESSING['std']]
    assert config['data.eval_crop'] == PREPROCESSING['eval_crop']
    assert metrics['images'] == 8 and metrics['macs'] < metrics['macs_dense'] and newest_step(workdir) == 6
    before, after = (read_newest(folder, 'params')[0] for folder in (pretrained, workdir))
    assert before['head.kernel'].shape == (16, 5) and after['head.kernel'].shape == (16, 2)
    np.testing.assert_allclose(after['blocks.0.mlp.fc1.kernel'], before['blocks.0.mlp.fc1.kernel'], atol=0.1)


def test_finetuned_run_resumes_without_init_from(finetuned, pretrained, images, tmp_path):
    workdir, metrics = finetuned
    for init_from in (pretrained, None, ''):
        assert loop.train(recipe(init_from, images), workdir)['top1'] == metrics['top1']
    with pytest.raises(ValueError, match=r'holds a run of another model .*model\.image_size 32 -> 64'):
        loop.train(recipe(pretrained, images, model__image_size=64), workdir)


def test_finetuned_run_loads_evaluates_and_predicts(finetuned, images):
    workdir, metrics = finetuned
    again = loop.evaluate_workdir(recipe(None, images), workdir, explicit=(), from_file=False)
    assert again['top1'] == metrics['top1']
    model = evit_jax.load(workdir)
    assert model.class_names == ('oak', 'pine') and model.plan.patches == 16
    assert model.predict(np.zeros((40, 50, 3), np.uint8))[0].top[0].name in model.class_names


@pytest.mark.slow  # tests/training/test_finetuning.py starts from a run, too
def test_finetuned_run_starts_another(finetuned, images, tmp_path):
    workdir, _ = finetuned
    loop.train(recipe(workdir, images, epochs=1, batch_size=24), tmp_path)
    assert saved(tmp_path)['model_config'] == saved(workdir)['model_config']


@pytest.mark.slow  # tests/training/test_freeze.py and test_finetuning.py train with one of the two changes
def test_finetune_as_a_linear_probe_at_another_image_size(pretrained, images, tmp_path):
    loop.train(recipe(pretrained, images, model__freeze='backbone', model__image_size=48, epochs=1), tmp_path)
    before, after = (read_newest(folder, 'params')[0] for folder in (pretrained, tmp_path))
    assert after['pos_embed'].shape == (1, 37, 16)
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {
        'pos_embed', 'head.kernel', 'head.bias'}


def test_finetune_at_a_rectangle_resizes_the_positions(pretrained, images, tmp_path):
    config = recipe(pretrained, images, model__image_size=16, model__image_width=48, epochs=1, batch_size=24)
    loop.train(config, tmp_path)
    assert read_newest(tmp_path, 'params')[0]['pos_embed'].shape == (1, 1 + 2 * 6, 16)
    assert evit_jax.load(tmp_path).loaded.image_size == (16, 48)
    config = recipe(None, images, model__image_size=32)
    for explicit, patches in (((), 12), (('model.image_size',), 16)):
        metrics = loop.evaluate_workdir(config, tmp_path, explicit=explicit, from_file=False, out=tmp_path / 'out')
        assert metrics['images'] == 8 and [*(tmp_path / 'out').glob(f'evaluate-evit-{patches}-*.json')]
    with pytest.raises(ValueError, match=r'another model .*model\.image_width 48 -> 0'):
        loop.train(recipe(pretrained, images, model__image_size=16, epochs=1, batch_size=24), tmp_path)


FOREIGN = {  # values of models whose weights need another treatment
    'dinov3': {'classes': 0, 'registers': 2, 'layer_scale': 1e-5, 'rope': 'dinov3', 'rope_base': 100.0,
               'absolute_positions': False, 'swiglu': True, 'k_bias': False},
    'clip': {'classes': 8, 'projection': True, 'head_bias': False, 'pre_norm': True, 'patch_bias': False},
    'siglip': {'classes': 0, 'class_token': False, 'pooling': 'map', 'qk_norm': True}}


@pytest.mark.parametrize('kind', ['dinov3', pytest.param('clip', marks=pytest.mark.slow),
                                  pytest.param('siglip', marks=pytest.mark.slow)])
def test_finetune_of_other_architectures_trains_a_new_head(kind, images, tmp_path):
    model_config = dataclasses.replace(MODEL, depth=2, **FOREIGN[kind])
    evit_jax.create_model(model_config, keep_rate=1.0).save(tmp_path / 'weights')
    metrics = loop.train(recipe(tmp_path / 'weights', images, epochs=1, batch_size=24), tmp_path / 'run')
    model = evit_jax.load(tmp_path / 'run')
    changed = {'classes': 2, 'projection': False, 'head_bias': True}
    assert model.config == dataclasses.replace(model_config, **changed) and model.class_names == ('oak', 'pine')
    assert metrics['images'] == 8 and model.params['head']['kernel'].shape == (16, 2)
    decays = weights.by_name(optimizer.decays(model.params))
    assert not any(decays[name] for name in decays if name.rpartition('.')[2] in (
        'bias', 'scale', 'gamma', 'q_bias', 'v_bias', 'cls_token', 'reg_token', 'pos_embed', 'latent'))
    assert all(decays[name] for name in decays if name.endswith('kernel'))


def test_finetune_of_a_hub_name_takes_its_model_and_resumes_without_the_hub(images, tmp_path, monkeypatch):
    config = recipe('hf-hub:lab/vit', images, epochs=1, batch_size=24)
    with fake_hub.running() as server:
        fake_hub.connect(monkeypatch, server.endpoint, tmp_path / 'cache')
        server.add('lab/vit', published.files(), 'a' * 40)
        metrics = loop.train(config, tmp_path / 'run')
    recorded = saved(tmp_path / 'run')
    assert recorded['base_model'] == f'hf-hub:lab/vit@{"a" * 40}' and recorded['data.mean'] == [0.5] * 3
    converted = evit_jax.load(tmp_path / 'run' / 'initial').config
    assert model_configs.saved_in(recorded) == dataclasses.replace(converted, classes=2)
    assert loop.train(config, tmp_path / 'run')['top1'] == metrics['top1']


@pytest.mark.slow  # tests/test_api.py trains a model on other classes, too
def test_finetune_through_the_api_takes_a_model(pretrained, images, tmp_path):
    model = evit_jax.load(pretrained).with_plan(keep_rate=0.5)
    config = recipe(None, epochs=1, batch_size=24)
    trained = evit_jax.train(config, workdir=tmp_path, model=model, train=images / 'train', test=images / 'val')
    assert trained.config == dataclasses.replace(MODEL, classes=2) and trained.plan == model.plan


def test_train_transform_of_the_recipe_without_its_weights_is_refused():
    with pytest.raises(ValueError, match=r'image_size=0 is the size of the weights .* give --config.model.image_size'):
        inputs.train_transform(flat(finetune.get_config()))


def test_resolve_of_a_named_model_changes_quarters_and_crop_only(pretrained, tmp_path):
    config = flat(layouts.config_of(model__name='deit_s', model__reduce_at=(-1,), data__eval_crop=-1.0))
    values, model_config = initial_model.resolve(config, tmp_path)
    assert values == {'model.reduce_at': (3, 6, 9), 'data.eval_crop': 224 / 256} and model_config is None
    values, _ = initial_model.resolve(config | {'init_from': str(pretrained)}, tmp_path)
    assert values['data.eval_crop'] == PREPROCESSING['eval_crop']


@pytest.mark.parametrize(('init_from', 'changes', 'message'), [
    (None, {}, 'starts from trained weights: give --config.init_from=WORKDIR'),
    ('', {}, 'config.model.name=init_from takes the model of config.init_from, which is empty'),
    ('nowhere', {}, 'init_from=nowhere: there is no file or folder nowhere'),
    ('', {'model__name': 'deit_s'}, 'config.model.image_size=0 takes the size of init_from')])
def test_finetune_without_weights_is_refused_before_the_workdir_is_made(init_from, changes, message, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        loop.train(recipe(init_from, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
