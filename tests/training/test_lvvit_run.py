"""An LV-ViT goes through the doors: trained, evaluated, fine-tuned, predicted with, and exported."""

import dataclasses
import json

import jax
import jax.export
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import read_newest
from evit_jax.inference import Predictor, load, load_model
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.serving import artifact
from evit_jax.training import experiment
from tests.helpers import layouts

SHAPE = LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, stem_width=4, init_std=0.1)
CONFIG = {'model__name': 'lvvit_least', 'model__drop_path': 0.1, 'epochs': 1, 'log__pictures': 0}

least = layouts.least


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Workdir and final metrics of a training on 8 devices."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.CONFIGS, 'lvvit_least', SHAPE)
        yield folder, layouts.train_here(folder, **CONFIG)


def statistics(params):
    """The running ones, by dotted path."""
    return {name: np.asarray(leaf) for name, leaf in weights.by_name(params).items()
            if name.endswith(('.mean', '.var'))}


def example():
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, (64, 16, 16, 3), np.uint8), 'label': (np.arange(64) % 3).astype(np.int32)}


def test_training_ends_with_weights_that_are_evaluated(run):
    folder, metrics = run
    assert metrics['images'] == 100 and np.isfinite(metrics['loss'])
    assert workdirs.saved_config(folder)['model.name'] == 'lvvit_least'


def test_running_statistics_are_learnt_and_averaged(run):
    found = [read_newest(run[0], field)[0] for field in ('params', 'ema')]
    for name in ('patch_embed.bn1.mean', 'patch_embed.bn3.var'):
        initial = float(name.endswith('var'))
        far, near = (np.abs(values[name] - initial).max() for values in found)
        assert far > near > 1e-3


@pytest.mark.parametrize('ema', [False, True])
def test_fine_tuning_on_other_classes_and_larger_images_begins_with_the_running_statistics(run, ema):
    shape = dataclasses.replace(SHAPE, classes=7, image_size=32)
    fresh = models.create(shape).init(jax.random.key(5))
    begun = weights.start_from(run[0], fresh, prefix=1, ema=ema)
    there = read_newest(run[0], 'ema' if ema else 'params')[0]
    assert len(statistics(begun)) == 2 * len(SHAPE.convolutions)
    for name, value in statistics(begun).items():
        np.testing.assert_array_equal(value, there[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, begun['aux_head'], fresh['aux_head'])


def with_initial_statistics(state):
    as_new = {'mean': np.zeros_like, 'var': np.ones_like}
    return state._replace(params=jax.tree_util.tree_map_with_path(
        lambda path, leaf: as_new.get(path[-1].key, lambda same: same)(leaf), state.params))


def test_what_is_fine_tuned_is_evaluated_with_the_statistics_that_it_began_with_and_they_move_on_from_there(run):
    laid = experiment.setup(layouts.config_of(init_from=str(run[0]), **CONFIG))
    begun, reset = laid.new_state(), with_initial_statistics(laid.new_state())
    evaluate, step = laid.eval_step(), laid.train_step()
    there, here, other = (evaluate(params, example(), laid.plan)['loss'] for params in (
        load_model(run[0]).params, begun.params, reset.params))
    np.testing.assert_array_equal(here, there)
    assert np.abs(here - other).max() > 1e-3

    before = [statistics(state.params) for state in (begun, reset)]
    after = [statistics(step(state, example(), laid.plan)[0].params) for state in (begun, reset)]
    for name in before[0]:  # a tenth is the batch's, in both the same
        np.testing.assert_allclose(after[0][name] - after[1][name], 0.9 * (before[0][name] - before[1][name]),
                                   rtol=1e-4, atol=1e-6)


def test_trained_weights_predict_and_are_exported(run, tmp_path):
    trained = load_model(run[0])
    assert trained.config.classes == 3 and trained.params['aux_head']['bias'].shape == (3,)
    images = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(3)]
    plans = {'0.5': trained.plan(rate=0.5), '1.0': trained.plan(rate=1.0)}
    found = Predictor(trained, batch_size=2).predict(images, plan=plans['0.5'])
    assert all(np.isfinite(prediction.logits).all() and len(prediction.kept[0]) == 9 for prediction in found)
    artifact.write(tmp_path, trained, plans, platforms=[jax.default_backend()], kept=True)
    assert all(difference < 1e-5 for _, difference in artifact.check(tmp_path, trained, plans))


def test_what_is_served_has_its_normalisation_folded_and_what_is_read_has_not(run, tmp_path):
    trained = load_model(run[0])
    artifact.write(tmp_path, trained, {'1.0': trained.plan(rate=1.0)}, platforms=[jax.default_backend()], kept=False)
    served = dict(np.load(tmp_path / 'weights.npz'))
    stem = {name.removeprefix('patch_embed.') for name in served if name.startswith('patch_embed.')}
    assert stem == {'proj.kernel', 'proj.bias', *(f'conv{number}.{part}' for number in (1, 2, 3)
                                                  for part in ('kernel', 'bias'))}
    told = json.loads((tmp_path / 'manifest.json').read_text(encoding='utf-8'))
    assert told['model']['parameters'] == sum(leaf.size for leaf in served.values())
    program = jax.export.deserialize(bytearray((tmp_path / 'plan_1.0.jaxexport').read_bytes())).mlir_module()
    assert program.count('stablehlo.rsqrt ') == 2 * SHAPE.depth + 1  # of the blocks' norms and the last
    assert set(statistics(load_model(run[0]).params)) == set(statistics(trained.params)) != set()
    images = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(2)]
    model = load(run[0])
    assert model.trained.config.folded
    for got, want in zip(model.predict(images), Predictor(trained).predict(images), strict=True):
        np.testing.assert_allclose(got.logits, want.logits, rtol=0, atol=1e-5)
