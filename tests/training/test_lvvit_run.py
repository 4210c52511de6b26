"""LV-ViT: trained, evaluated, fine-tuned, used for prediction, and exported."""

import dataclasses
import json

import jax
import jax.export
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import read_newest
from evit_jax.inference.model import VisionModel
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.serving import artifact
from tests.helpers import layouts
from tests.helpers.weights import random_params

SHAPE = LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, stem_width=4, init_std=0.1)
CONFIG = {'model__name': 'lvvit_least', 'model__drop_path': 0.1, 'epochs': 1, 'log__pictures': 0}


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Workdir and final metrics of a training on 8 devices."""
    folder = tmp_path_factory.mktemp('run')
    return folder, layouts.train_here(folder, SHAPE, **CONFIG)


def statistics(params):
    """Returns the running statistics by dotted path."""
    return {name: np.asarray(leaf) for name, leaf in weights.by_name(params).items()
            if name.endswith(('.mean', '.var'))}


def batch():
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, (64, 16, 16, 3), np.uint8), 'label': (np.arange(64) % 3).astype(np.int32)}


def test_train_ends_with_finite_metrics(run):
    folder, metrics = run
    assert metrics['images'] == 100 and np.isfinite(metrics['loss'])
    assert workdirs.saved_config(folder)['model.name'] == 'lvvit_least'


def test_train_updates_the_running_statistics_and_their_ema(run):
    weights_and_ema = [read_newest(run[0], field)[0] for field in ('params', 'ema')]
    for name in ('patch_embed.bn1.mean', 'patch_embed.bn3.var'):
        initial = float(name.endswith('var'))
        far, near = (np.abs(values[name] - initial).max() for values in weights_and_ema)
        assert far > near > 1e-3


@pytest.mark.parametrize('ema', [False, True])
def test_start_from_with_other_classes_and_image_size_keeps_the_running_statistics(run, ema):
    shape = dataclasses.replace(SHAPE, classes=7, image_size=32)
    fresh = random_params(models.create(shape), 5)
    started = weights.start_from(run[0], fresh, config=shape, ema=ema)
    before = read_newest(run[0], 'ema' if ema else 'params')[0]
    assert len(statistics(started)) == 2 * len(SHAPE.convolutions)
    for name, value in statistics(started).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, started['aux_head'], fresh['aux_head'])


def with_initial_statistics(state):
    initial = {'mean': np.zeros_like, 'var': np.ones_like}
    return state._replace(params=jax.tree_util.tree_map_with_path(
        lambda path, leaf: initial.get(path[-1].key, lambda value: value)(leaf), state.params))


def test_fine_tuning_starts_from_the_running_statistics_and_updates_them(run):
    fine_tuning = layouts.setup(SHAPE, init_from=str(run[0]), **CONFIG)
    started, reset = fine_tuning.new_state(), with_initial_statistics(fine_tuning.new_state())
    evaluate, step, plan = fine_tuning.eval_step(), fine_tuning.train_step(), fine_tuning.plan
    want, got, other = (evaluate(params, batch(), plan)['loss'] for params in (
        load_model(run[0]).params, started.params, reset.params))
    np.testing.assert_array_equal(got, want)
    assert np.abs(got - other).max() > 1e-3

    before = [statistics(state.params) for state in (started, reset)]
    after = [statistics(step(state, batch(), plan)[0].params) for state in (started, reset)]
    for name in before[0]:  # a tenth comes from the batch, equal in both
        np.testing.assert_allclose(after[0][name] - after[1][name], 0.9 * (before[0][name] - before[1][name]),
                                   rtol=1e-4, atol=1e-6)


def test_trained_weights_predict_and_export(run, tmp_path):
    trained = load_model(run[0])
    assert trained.config.classes == 3 and trained.params['aux_head']['bias'].shape == (3,)
    images = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(3)]
    plans = {'0.5': trained.plan(keep_rate=0.5), '1.0': trained.plan(keep_rate=1.0)}
    predictions = VisionModel(trained, batch_size=2).with_plan(plan=plans['0.5']).predict(images)
    assert all(np.isfinite(prediction.logits).all() and len(prediction.kept[0]) == 9 for prediction in predictions)
    artifact.write(tmp_path, trained, plans, platforms=[jax.default_backend()], kept=True)
    assert all(difference < 1e-5 for _, difference in artifact.check(tmp_path, trained, plans))


def test_export_folds_the_batch_norm_and_load_model_does_not(run, tmp_path):
    trained = load_model(run[0])
    plans = {'1.0': trained.plan(keep_rate=1.0)}
    artifact.write(tmp_path, trained, plans, platforms=[jax.default_backend()], kept=False)
    served = dict(np.load(tmp_path / 'weights.npz'))
    stem = {name.removeprefix('patch_embed.') for name in served if name.startswith('patch_embed.')}
    assert stem == {'proj.kernel', 'proj.bias', *(f'conv{number}.{part}' for number in (1, 2, 3)
                                                  for part in ('kernel', 'bias'))}
    manifest = json.loads((tmp_path / 'manifest.json').read_text(encoding='utf-8'))
    assert manifest['model']['parameters'] == sum(leaf.size for leaf in served.values())
    program = jax.export.deserialize(bytearray((tmp_path / 'plan_1.0.jaxexport').read_bytes())).mlir_module()
    assert program.count('stablehlo.rsqrt ') == 2 * SHAPE.depth + 1  # two norms in each block, and the last norm
    assert set(statistics(load_model(run[0]).params)) == set(statistics(trained.params)) != set()
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    model = VisionModel(trained)
    assert set(statistics(model.params)) == set(statistics(trained.params))
    np.testing.assert_allclose(model(images), jax.jit(model.apply)(model.params, images).logits, rtol=0, atol=1e-5)
