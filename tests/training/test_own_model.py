"""Training and evaluation with a model and sources that are passed as objects."""

import dataclasses
import json

import pytest

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints.manager import read_newest
from evit_jax.checkpoints.workdir import flat
from evit_jax.training import experiment, loop, model_setup
from tests.helpers import layouts

MODEL = dataclasses.replace(layouts.SHAPE, width=32, classes=3)
QUIET = {'model__name': 'deit_s', 'model__image_size': 224, 'epochs': 1, 'log__pictures': 0, 'batch_size': 64}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Workdir and metrics of a training with a model object, although the config names another model."""
    workdir = tmp_path_factory.mktemp('run')
    metrics = loop.train(layouts.config_of(**QUIET), workdir, sources=layouts.sources(), model_config=MODEL)
    return workdir, metrics


def test_train_with_model_and_sources_as_objects_records_both(run):
    workdir, metrics = run
    params, metadata = read_newest(workdir, 'params')
    assert params['blocks.0.norm1.bias'].shape == (32,) and metrics['images'] == 100
    assert metadata['model_config'] == model_configs.to_json(MODEL)
    assert metadata['class_names'] == ['red', 'green', 'blue']
    saved = json.loads((workdir / 'config.json').read_text())
    assert model_configs.saved_in(saved) == MODEL
    assert (saved['model.name'], saved['model.image_size'], saved['model.classes']) == ('custom', 16, 3)
    assert saved['data.source'] == 'custom'


def test_evaluate_workdir_of_a_custom_model_needs_no_model_object(run):
    workdir, metrics = run
    for explicit in ((), ('keep.rate',)):
        again = loop.evaluate_workdir(layouts.config_of(keep__rate=1.0), workdir, source=layouts.Colours('test'),
                                      explicit=explicit, from_file=False)
        assert (again['macs'] == again['macs_dense']) == bool(explicit)
        assert (again['top1'], again['macs']) == (metrics['top1'], metrics['macs']) or explicit


def test_evaluate_workdir_trained_on_objects_without_a_source_is_refused_with_the_flags_to_give(run):
    with pytest.raises(ValueError, match=r'data that was passed as objects.*--config.data.source=folder'):
        loop.evaluate_workdir(layouts.config_of(), run[0], explicit=(), from_file=False)


def test_train_resumed_with_another_model_is_refused_by_field(run):
    workdir, metrics = run
    config = layouts.config_of(**QUIET)
    assert loop.train(config, workdir, sources=layouts.sources(), model_config=MODEL)['top1'] == metrics['top1']
    for other, message in ((dataclasses.replace(MODEL, width=64), 'model_config.width 32 -> 64'),
                           (dataclasses.replace(MODEL, heads=4), 'model.heads 2 -> 4')):
        with pytest.raises(ValueError, match=rf'holds a run of another model \({message}\)'):
            loop.train(config, workdir, sources=layouts.sources(), model_config=other, accept_changes=True)


def test_setup_with_sources_of_other_classes_is_refused():
    with pytest.raises(ValueError, match=r'config.model.classes=7, but the data has 3 classes'):
        experiment.setup(layouts.config_of(model__classes=7), sources=layouts.sources(), model_config=MODEL)


def test_values_of_model_keep_the_name_of_a_named_model():
    config = flat(layouts.config_of(model__name='deit_s'))
    named = dataclasses.replace(models.get_config('deit_s'), image_size=384, classes=5, activation='quick_gelu')
    values = model_setup.values_of_model(named, 'deit_s')
    assert [values[f'model.{key}'] for key in ('name', 'image_size', 'activation')] == ['deit_s', 384, 'quick_gelu']
    assert model_setup.config_and_plans(config | values)[0] == named
    values = model_setup.values_of_model(MODEL, 'deit_s')
    assert values['model.name'] == 'custom'
    assert model_setup.config_and_plans(config | values, base=MODEL)[0] == MODEL
