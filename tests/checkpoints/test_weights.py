"""Weights by themselves: what is saved is read, evaluated, and begun from, and nothing else is."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import base
from evit_jax import models
from evit_jax.checkpoints import loaded as trained_weights
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.training import experiment, loop
from tests.helpers import layouts


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('trained')
    return workdir, layouts.train_here(workdir, epochs=2)


def test_weights_saved_alone_are_evaluated_and_begun_from_as_those_of_the_run(trained, tmp_path):
    workdir, metrics = trained
    laid = experiment.setup(layouts.config_of())
    params, ema, step = weights.read(workdir, laid.abstract_state().params)
    assert step == 4 and ema is not None
    weights.save(tmp_path / 'alone', params, {'config': layouts.config_of().to_dict(),
                                             'class_names': ['red', 'green', 'blue']})
    again = loop.evaluate_workdir(layouts.config_of(), tmp_path / 'alone')
    assert {name: again[name] for name in ('loss', 'top1')} == {name: metrics[name] for name in ('loss', 'top1')}
    assert 'top1_ema' not in again
    kept, none, zero = weights.read(tmp_path / 'alone', params)
    jax.tree.map(np.testing.assert_array_equal, kept, params)
    assert none is None and zero == 0
    loop.train(layouts.config_of(init_from=str(tmp_path / 'alone'), epochs=1), tmp_path / 'next')
    with pytest.raises(ValueError, match='moving average'):
        loop.train(layouts.config_of(init_from=str(tmp_path / 'alone'), init_ema=True), tmp_path / 'other')


def test_weights_with_a_partial_config_are_evaluated_as_they_predict(tmp_path, caplog):
    caplog.set_level('INFO')
    shape = dataclasses.replace(layouts.SHAPE, depth=10, classes=3)  # DeiT's plan reduces at block 9
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONFIGS, 'vit_layouts', shape)
        weights.save(tmp_path, models.create(shape).init(jax.random.key(0)), {'config': {'model': {
            'name': 'vit_layouts'}}, 'class_names': ['red', 'green', 'blue']})
        predicted = load_model(tmp_path)
        laid = []
        patch.setattr(loop.results, 'evaluate_into', lambda run, *_, **__: laid.append(experiment))
        config = base.get_config()
        config.data.source = 'generated'
        loop.evaluate_workdir(config, tmp_path, explicit=['data.source'], from_file=False)
    assert laid[0].plan == predicted.plan() and laid[0].config.model.image_size == predicted.image_size == 16
    assert laid[0].config.model.dtype == predicted.dtype == 'float32'
    assert (laid[0].config.data.mean, laid[0].config.data.eval_crop) == (predicted.mean, predicted.eval_crop)


@pytest.mark.parametrize(('platform', 'dtype'), [('cpu', 'float32'), ('gpu', 'bfloat16')])
def test_weights_without_a_dtype_predict_in_that_of_the_machine_as_they_are_evaluated(tmp_path, monkeypatch, platform,
                                                                                      dtype):
    shape = dataclasses.replace(layouts.SHAPE, depth=10, classes=3)
    monkeypatch.setitem(models.CONFIGS, 'vit_layouts', shape)
    weights.save(tmp_path, models.create(shape).init(jax.random.key(0)), {'config': {'model': {'name': 'vit_layouts'}}})
    monkeypatch.setattr(trained_weights.jax, 'default_backend', lambda: platform)
    assert load_model(tmp_path).dtype == dtype


def test_a_file_as_the_workdir_of_an_evaluation_names_convert(tmp_path):
    (tmp_path / 'a.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match=r'--workdir: \S+a.safetensors is a file: .*evit_jax.convert'):
        loop.evaluate_workdir(layouts.config_of(), tmp_path / 'a.safetensors')


def test_an_evaluation_changes_nothing_of_a_run_that_goes_on(trained):
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
    laid = experiment.setup(layouts.config_of(model__classes=4))
    with pytest.raises(ValueError, match=r'head.bias has shape \(3,\), wanted \(4,\)'):
        laid.trained_state(workdir)
    assert read_newest(workdir, 'params')[1]['next_step'] == 4
