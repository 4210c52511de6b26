"""Models without classes: features work, and everything that needs classes is refused with the way out."""

import dataclasses

import numpy as np
import pytest

import evit_jax
from evit_jax.inference import dropping
from evit_jax.inference.annotator import Annotator
from tests.helpers import layouts, tiny

WAY_OUT = r'returns features and has no classes: fine-tune it .*--mode=knn, or use evit_jax.load'
KINDS = {'no head': {'classes': 0}, 'projection': {'classes': 8, 'projection': True, 'head_bias': False}}


@pytest.fixture(scope='module', params=KINDS)
def model(request, tmp_path_factory):
    """A model without classes, loaded from a folder."""
    folder = tmp_path_factory.mktemp('weights') / 'features'
    evit_jax.create_model(dataclasses.replace(tiny.CONFIG, **KINDS[request.param]), reduce_at=(1,)).save(folder)
    return evit_jax.load(folder)


def test_model_without_classes_returns_features(model):
    output = model.forward(tiny.images(2))
    assert model.class_names == () and output.features.shape == (2, 32)
    assert model(tiny.images(2)).shape == (2, model.config.classes or 32)
    if not model.config.classes:
        np.testing.assert_array_equal(output.logits, output.features)
    assert f'{model.config.classes or 32} features and no classes' in repr(model)
    data = tiny.images(6), np.arange(6) % 3
    assert evit_jax.knn(model, data, data, k=(1,))['top1_k1'] == 1.0


def test_use_that_needs_classes_is_refused_with_the_way_out(model):
    data = tiny.images(6), np.arange(6) % 3
    for use in (lambda: model.predict(tiny.images(1)[0]), lambda: evit_jax.evaluate(model, data),
                lambda: Annotator(model.loaded, batch_size=1),
                lambda: dropping.drop_patches(model.loaded, evit_jax.as_source(data), shares=(0.5,)),
                lambda: layouts.evaluate_here(model.loaded.path, explicit=('data.source',))):
        with pytest.raises(ValueError, match=WAY_OUT):
            use()
