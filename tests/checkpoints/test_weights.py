"""Weights without a training state: they are saved, read, evaluated, and used to start another run."""

import dataclasses

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import loaded as trained_weights
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.configs import base
from evit_jax.training import experiment, loop
from tests.helpers import layouts
from tests.helpers.weights import random_params


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained')
    return workdir, layouts.train_here(workdir, epochs=2)


def test_weights_saved_alone_evaluate_and_initialise_like_those_of_the_run(trained, tmp_path):
    workdir, metrics = trained
    run = experiment.setup(layouts.config_of())
    params, ema, step = weights.read(workdir, run.abstract_state().params)
    assert step == 4 and ema is not None
    weights.save(tmp_path / 'alone', params, {'config': layouts.config_of().to_dict(),
                                             'class_names': ['red', 'green', 'blue']})
    result = loop.evaluate_workdir(layouts.config_of(), tmp_path / 'alone')
    assert {name: result[name] for name in ('loss', 'top1')} == {name: metrics[name] for name in ('loss', 'top1')}
    assert 'top1_ema' not in result
    saved, saved_ema, saved_step = weights.read(tmp_path / 'alone', params)
    jax.tree.map(np.testing.assert_array_equal, saved, params)
    assert saved_ema is None and saved_step == 0
    loop.train(layouts.config_of(init_from=str(tmp_path / 'alone'), epochs=1), tmp_path / 'next')
    with pytest.raises(ValueError, match='moving average'):
        loop.train(layouts.config_of(init_from=str(tmp_path / 'alone'), init_ema=True), tmp_path / 'other')


def test_weights_with_a_partial_config_evaluate_with_the_settings_of_prediction(tmp_path, caplog):
    caplog.set_level('INFO')
    shape = dataclasses.replace(layouts.SHAPE, depth=10, classes=3)  # DeiT's plan reduces at block 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONFIGS, 'vit_layouts', shape)
        weights.save(tmp_path, random_params(models.create(shape)), {'config': {'model': {
            'name': 'vit_layouts'}}, 'class_names': ['red', 'green', 'blue']})
        predicted = load_model(tmp_path)
        runs = []
        patch.setattr(loop.results, 'evaluate_into', lambda run, *_, **__: runs.append(run))
        config = base.get_config()
        config.data.source = 'generated'
        loop.evaluate_workdir(config, tmp_path, explicit=['data.source'], from_file=False)
    assert runs[0].plan == predicted.plan() and runs[0].config.model.image_size == predicted.image_size == 16
    assert runs[0].config.model.dtype == predicted.dtype == 'float32'
    assert (runs[0].config.data.mean, runs[0].config.data.eval_crop) == (predicted.mean, predicted.eval_crop)


@pytest.mark.parametrize(('platform', 'dtype'), [('cpu', 'float32'), ('gpu', 'bfloat16')])
def test_load_model_without_a_dtype_takes_that_of_the_platform(tmp_path, monkeypatch, platform, dtype):
    shape = dataclasses.replace(layouts.SHAPE, depth=10, classes=3)
    monkeypatch.setitem(models.CONFIGS, 'vit_layouts', shape)
    weights.save(tmp_path, random_params(models.create(shape)), {'config': {'model': {'name': 'vit_layouts'}}})
    monkeypatch.setattr(trained_weights.jax, 'default_backend', lambda: platform)
    assert load_model(tmp_path).dtype == dtype


def test_evaluate_workdir_of_a_file_names_convert(tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'--workdir: \S+a.safetensors is a file: .*evit_jax.convert'):
        loop.evaluate_workdir(layouts.config_of(), tmp_path / 'a.safetensors')


def test_evaluate_workdir_changes_nothing_of_a_run_under_way(trained):
    workdir, metrics = trained
    unfinished = workdir / 'checkpoints' / '6.orbax-checkpoint-tmp'
    unfinished.mkdir()
    try:
        assert loop.evaluate_workdir(layouts.config_of(), workdir)['top1'] == metrics['top1']
        assert unfinished.exists() and newest_step(workdir) == 4
    finally:
        unfinished.rmdir()


def test_weights_of_another_model_are_refused_by_name(trained):
    workdir, _ = trained
    run = experiment.setup(layouts.config_of(model__classes=4))
    with pytest.raises(ValueError, match=r'head.bias has shape \(3,\), wanted \(4,\)'):
        run.trained_state(workdir)
    assert read_newest(workdir, 'params')[1]['next_step'] == 4


def test_completed_splits_a_pair_into_height_and_width():
    config = weights.completed({'model.name': 'custom', 'model.image_size': [192, 384]})
    assert (config['model.image_size'], config['model.image_width']) == (192, 384)
