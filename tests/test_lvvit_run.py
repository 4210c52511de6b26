"""An LV-ViT goes through the doors: trained, evaluated, predicted with, and exported."""

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.inference import Predictor, read_trained
from evit_jax.models.lvvit import LVViTShape
from evit_jax.serving import artifact
from evit_jax.training import workdir as workdirs
from tests import layouts

SHAPE = LVViTShape(image_size=16, patch_size=4, width=16, depth=2, heads=2, stem_width=4, init_std=0.1)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Workdir and final metrics of a training on 8 devices."""
    folder = tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.SHAPES, 'lvvit_least', SHAPE)
        yield folder, layouts.train_here(folder, model__name='lvvit_least', model__drop_path=0.1)


def test_training_ends_with_weights_that_are_evaluated(run):
    folder, metrics = run
    assert metrics['images'] == 100 and np.isfinite(metrics['loss'])
    assert workdirs.saved_config(folder)['model.name'] == 'lvvit_least'


def test_trained_weights_predict_and_are_exported(run, tmp_path):
    trained = read_trained(run[0])
    assert trained.shape.classes == 3 and trained.params['aux_head']['bias'].shape == (3,)
    images = [np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8) for seed in range(3)]
    plans = {'0.5': trained.plan(rate=0.5), '1.0': trained.plan(rate=1.0)}
    found = Predictor(trained, batch_size=2).predict(images, plan=plans['0.5'])
    assert all(np.isfinite(prediction.logits).all() and len(prediction.kept[0]) == 9 for prediction in found)
    artifact.write(tmp_path, trained, plans, platforms=[jax.default_backend()], kept=True)
    assert all(difference < 1e-5 for _, difference in artifact.check(tmp_path, trained, plans))
