"""A DynamicViT through the doors: trained under a mask, from a plain model; converted, and run as it was trained."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.inference.looking import Subject, look
from evit_jax.inference.model import VisionModel
from evit_jax.interchange import conversion, run_metadata, safetensors_file, torch_weights
from evit_jax.training import experiment
from tests.helpers import layouts

CONFIG = {'reducer__name': 'dynamicvit', 'model__reduce_at': (0, 1), 'keep__rate': 0.5, 'batch_size': 16, 'epochs': 1,
          'ema_decay': 0.0, 'log__pictures': 0}


least = layouts.least


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        yield caplog


def shape_of(predictors):
    return dataclasses.replace(layouts.SHAPE, classes=3, predictors=predictors)


def initial(predictors, seed=1):
    return models.create(shape_of(predictors)).init(jax.random.key(seed))


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp('plain')
    weights.save(folder, initial(0), {'config': layouts.config_of().to_dict(), 'class_names': ['red', 'green', 'blue']})
    return folder


@pytest.fixture(scope='module')
def trained(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    return folder, layouts.train_here(folder, init_from=str(plain), **CONFIG)


def pixels():
    return list(np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8))


def test_training_masks_and_evaluation_drops():
    laid = experiment.setup(layouts.config_of(**CONFIG))
    assert laid.model.config.predictors == 2
    assert [stage.plan for stage in laid.stages] == [laid.plan.in_training()]
    assert laid.plan.counts == (8, 4) and laid.stages[0].plan.counts == (16, 16)
    assert experiment.setup(layouts.config_of()).model.config.predictors == 0


def test_a_run_from_a_plain_model_is_read_with_its_predictors(trained):
    folder, metrics = trained
    found = load_model(folder)
    assert found.config.predictors == 2 and found.budget.reducer.name == 'dynamicvit' and found.plan().counts == (8, 4)
    assert 0 < metrics['top1'] <= 1
    model = VisionModel(found, batch_size=5)
    predictions = model.predict(pixels())
    for prediction in predictions:
        assert [len(ids) for ids in prediction.kept] == [8, 4] and {*prediction.kept[1]} <= {*prediction.kept[0]}
    (example,), _, _ = look(model, [Subject('first', pixels()[0], None)], [0.5])
    assert [stage.kept for stage in example.views[0].stages] == [tuple(ids) for ids in predictions[0].kept]
    assert [stage.attention for stage in example.views[0].stages] == [None, None]


def test_a_start_keeps_what_both_have_and_says_what_is_fresh_or_left_out(plain, trained, log):
    begun = weights.start_from(plain, initial(2, seed=7), prefix=1, ema=False)
    jax.tree.map(np.testing.assert_array_equal, begun['blocks'], initial(0)['blocks'])
    jax.tree.map(np.testing.assert_array_equal, begun['score_predictor'], initial(2, seed=7)['score_predictor'])
    assert 'fresh, as they are not there: score_predictor.0.in_conv.0.bias' in log.text
    back = weights.start_from(trained[0], initial(1), prefix=1, ema=False)
    want = load_model(trained[0]).params
    jax.tree.map(np.testing.assert_array_equal, back['score_predictor'][0], want['score_predictor'][0])
    assert 'left out, as this model asks no such predictors: score_predictor.1.in_conv' in log.text


def test_there_and_back_loses_no_bit_and_keeps_the_way_of_dropping(trained, tmp_path, log):
    conversion.to_safetensors(trained[0], tmp_path / 'a.safetensors')
    assert 'score_predictor.1.out_conv.4.weight' in load_file(tmp_path / 'a.safetensors')
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'b')
    assert 'vit_layouts, images of 16, 3 classes, 2 predictors; names of DynamicViT' in log.text
    want, got = load_model(trained[0]), load_model(tmp_path / 'b')
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert got.plan() == want.plan()


def test_weights_with_predictors_are_a_dynamicvit_where_nothing_else_is_said(tmp_path):
    safetensors_file.write(tmp_path / 'a.safetensors', torch_weights.to_torch(initial(2), shape_of(2)), {})
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'a')
    assert workdir.saved_config(tmp_path / 'a')['reducer.name'] == 'dynamicvit'
    assert run_metadata.settings_of({'base_rate': 0.7, 'model': 'deit-s'}) == {'keep.rate': 0.7}


def test_a_model_without_predictors_cannot_be_asked_for_them(plain):
    found = load_model(plain)
    asked = found._replace(budget=found.budget._replace(
        reducer=found.budget.reducer._replace(name='mine', predicts=True)))
    with pytest.raises(ValueError, match=r'mine asks a trained predictor .* blocks \(1,\), .* has no predictors'):
        asked.plan(keep_rate=0.5)
