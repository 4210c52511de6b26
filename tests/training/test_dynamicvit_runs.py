"""DynamicViT: trained with masked tokens from dense weights, loaded, converted, and used for prediction."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from evit_jax import models
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import load_model
from evit_jax.inference.keep_rates import LabelledImage, predict_examples
from evit_jax.inference.model import VisionModel
from evit_jax.interchange import conversion, run_metadata, safetensors_file, torch_weights
from evit_jax.reduction import registry
from evit_jax.reduction.reducer import NO_MODULES, Modules
from tests.helpers import layouts
from tests.helpers.weights import random_params

CONFIG = {'reducer__name': 'dynamicvit', 'model__reduce_at': (0, 1), 'keep__rate': 0.5, 'batch_size': 16, 'epochs': 1,
          'ema_decay': 0.0, 'log__pictures': 0}


least = layouts.least  # `load_model` looks the model up by its name
DYNAMICVIT = registry.get_reducer('dynamicvit')
CONFIG_OF_WEIGHTS = dataclasses.replace(layouts.SHAPE, classes=3)


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        yield caplog


@functools.cache
def initial(predictors, seed=1):
    modules = Modules(DYNAMICVIT, predictors) if predictors else NO_MODULES
    return random_params(models.create(CONFIG_OF_WEIGHTS, modules=modules), seed)


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


def test_setup_masks_tokens_in_training_and_drops_them_in_evaluation():
    run = layouts.setup(**CONFIG)
    assert run.model.modules.count == 2
    assert [stage.plan for stage in run.stages] == [run.plan.in_training()]
    assert run.plan.counts == (8, 4) and run.stages[0].plan.counts == (16, 16)
    assert layouts.setup().model.modules.count == 0


def test_load_model_of_a_run_from_dense_weights_has_predictors(trained):
    folder, metrics = trained
    loaded = load_model(folder)
    assert loaded.modules == Modules(DYNAMICVIT, 2, (0, 1)) and loaded.budget.reducer == DYNAMICVIT
    assert loaded.plan().counts == (8, 4)
    assert 0 < metrics['top1'] <= 1
    model = VisionModel(loaded, batch_size=5)
    predictions = model.predict(pixels())
    for prediction in predictions:
        assert [len(ids) for ids in prediction.kept] == [8, 4] and {*prediction.kept[1]} <= {*prediction.kept[0]}
    (example,), _, _ = predict_examples(model, [LabelledImage('first', pixels()[0], None)], [0.5])
    assert [stage.kept for stage in example.views[0].stages] == [tuple(ids) for ids in predictions[0].kept]
    assert [stage.attention for stage in example.views[0].stages] == [None, None]


def test_start_from_keeps_common_weights_and_logs_new_and_left_out_predictors(plain, trained, log):
    started = weights.start_from(plain, initial(2, seed=7), config=CONFIG_OF_WEIGHTS, ema=False)
    jax.tree.map(np.testing.assert_array_equal, started['blocks'], initial(0)['blocks'])
    jax.tree.map(np.testing.assert_array_equal, started['reducer'], initial(2, seed=7)['reducer'])
    assert 'fresh, as they are not there: reducer.0.in_conv.0.bias' in log.text
    back = weights.start_from(trained[0], initial(1), config=CONFIG_OF_WEIGHTS, ema=False)
    want = load_model(trained[0]).params
    jax.tree.map(np.testing.assert_array_equal, back['reducer'][0], want['reducer'][0])
    assert 'left out, as the reducer of this model has no such parameters: reducer.1.in_conv' in log.text


def test_to_safetensors_and_back_keeps_the_bits_and_the_plan(trained, tmp_path, log):
    conversion.to_safetensors(trained[0], tmp_path / 'a.safetensors')
    assert 'score_predictor.1.out_conv.4.weight' in load_file(tmp_path / 'a.safetensors')
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'b')
    assert 'vit_layouts, images of 16, 3 classes, 2 learned modules of dynamicvit; layout DynamicViT' in log.text
    want, got = load_model(trained[0]), load_model(tmp_path / 'b')
    jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
    assert got.plan() == want.plan()


def test_to_workdir_of_weights_with_predictors_is_a_dynamicvit(tmp_path):
    arrays = torch_weights.to_torch(initial(2), CONFIG_OF_WEIGHTS, Modules(DYNAMICVIT, 2))
    safetensors_file.write(tmp_path / 'a.safetensors', arrays, {})
    conversion.to_workdir(tmp_path / 'a.safetensors', tmp_path / 'a')
    assert workdir.saved_config(tmp_path / 'a')['reducer.name'] == 'dynamicvit'
    assert run_metadata.plan_settings({'base_rate': 0.7, 'model': 'deit-s'}) == {'keep.rate': 0.7}


def test_plan_with_dynamicvit_of_a_model_without_predictors_is_refused(plain):
    with pytest.raises(ValueError, match=r'dynamicvit needs a learned module .* blocks \(1,\), .* none of its modules'):
        load_model(plain).with_reducer('dynamicvit').plan(keep_rate=0.5)
