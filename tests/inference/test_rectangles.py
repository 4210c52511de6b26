"""Models for images that are not square: inference, pictures, dense maps, saving, and refusals."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.inference.annotator import Annotator
from evit_jax.serving import artifact
from evit_jax.training.evaluation import object_patches
from tests.helpers import tiny

SIZE = 16, 24  # 4 rows and 6 columns of patches


@pytest.fixture(scope='module')
def model():
    config = dataclasses.replace(tiny.CONFIG, image_size=SIZE)
    return evit_jax.create_model(config, keep_rate=0.5, reduce_at=(1,), class_names=tiny.NAMES)


def pixels(count=2, height=SIZE[0], width=SIZE[1]):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def test_model_of_rectangles_takes_images_of_its_size_only(model):
    assert model(pixels()).shape == (2, 3) and 'images of 16 x 24;' in repr(model)
    with pytest.raises(ValueError, match=r'images are 24 x 16, the model takes 16 x 24: .*with_image_size\(\(24, 16\)'):
        model(pixels(2, 24, 16))


def test_with_image_size_of_a_square_model_takes_a_rectangle():
    model = tiny.model().with_image_size([16, 24])
    assert model.loaded.image_size == (16, 24) and model.plan.patches == 24 and model(pixels()).shape == (2, 3)
    assert model.with_image_size((16, 16)).loaded.image_size == 16
    with pytest.raises(ValueError, match='image size 18'):
        model.with_image_size((16, 18))


def test_predict_crops_a_rectangle_and_draw_shows_it(model):
    prediction, = model.predict(Image.new('RGB', (90, 70)))
    assert prediction.image.shape == (16, 24, 3) and len(prediction.kept[0]) == 13
    assert model.draw(prediction).width > model.draw(prediction).height


def test_unpool_of_a_rectangle_has_its_rows_and_columns(model):
    output = model.forward(pixels())
    dense = model.unpool(output.patch_tokens, output.token_of_patch)
    assert dense.shape == (2, 4, 6, 32)
    token = int(output.token_of_patch[-1][0, 13])
    np.testing.assert_array_equal(dense[0, 2, 1], output.patch_tokens[0, token])
    everything = model.with_plan(keep_rate=1.0)
    output = everything.forward(pixels())
    np.testing.assert_array_equal(everything.unpool(output.patch_tokens, ())[1, 3, 5], output.patch_tokens[1, 23])


def test_save_and_load_keep_the_rectangle(model, tmp_path):
    model.save(tmp_path / 'weights')
    loaded = evit_jax.load(tmp_path / 'weights')
    assert loaded.loaded.image_size == SIZE and loaded.config == model.config
    np.testing.assert_array_equal(loaded(pixels()), model(pixels()))


def test_evaluate_and_knn_of_a_rectangle_count_every_image(model):
    data = pixels(6, 40, 40), np.arange(6) % 3
    assert evit_jax.evaluate(model, data)['images'] == 6
    assert evit_jax.knn(model, data, data, k=(1,))['top1_k1'] == 1.0


def test_object_patches_of_a_rectangle_follow_the_rows():
    mask = np.zeros((1, 16, 24), bool)
    mask[0, 4:8, 20:] = True
    assert np.flatnonzero(object_patches(mask, 24)).tolist() == [11]


def test_export_of_a_rectangle_computes_the_probabilities_of_the_model(model, tmp_path):
    artifact.write(tmp_path, model.loaded, {'plan': model.plan}, platforms=['cpu'], kept=True)
    assert [name for name, _ in artifact.check(tmp_path, model.loaded, {'plan': model.plan})] == ['plan']
    readme = (tmp_path / 'README.md').read_text()
    assert 'uint8 [b, 16, 24, 3]' in readme and 'a grid of 4 x 6;' in readme


def test_label_maps_of_a_rectangle_have_its_grid_and_the_logits_of_its_patches(model):
    annotator = Annotator(model.loaded, batch_size=2)
    images = pixels(1)
    label_map, = annotator._compute(images)
    assert annotator.grid == (4, 6) and ' at 16x24 pixels, ' in str(annotator)
    assert label_map.value.shape == label_map.index.shape == (annotator.top, 4, 6)
    head, dense = model.loaded.params['head'], model.with_plan(keep_rate=1.0)
    logits = np.asarray(dense.forward(images).patch_tokens) @ head['kernel'] + head['bias']
    np.testing.assert_array_equal(label_map.index[0], logits[0].argmax(axis=-1).reshape(4, 6))
