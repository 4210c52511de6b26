"""VisionModel.predict: predictions of image files, Pillow images and arrays, independent of their number."""


import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.checkpoints import weights
from evit_jax.inference.model import VisionModel
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import experiment, results
from tests.helpers import layouts, tiny
from tests.helpers.weights import random_params

SIZES = [(40, 30), (16, 16), (9, 50), (33, 32)]


@pytest.fixture(scope='module')
def model():
    return tiny.model(batch_size=8)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    """Image files of several sizes; the sixth is damaged."""
    folder = tmp_path_factory.mktemp('photos')
    paths = [folder / f'{number}.{"jpg" if number % 2 else "png"}' for number in range(21)]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize(SIZES[number % len(SIZES)]).save(path)
    paths[5].write_bytes(b'\xff\xd8 no image')
    return paths


def test_predict_unreadable_image_has_a_problem_and_changes_no_other_prediction(model, paths):
    images = [paths[0].with_name('none.png'), *paths]
    predictions = model.predict(images)
    assert [prediction.name for prediction in predictions] == list(map(str, images))
    assert [number for number, prediction in enumerate(predictions) if prediction.problem] == [0, 6]
    assert predictions[0].problem == 'No such file or directory'
    assert 'not a readable image' in predictions[6].problem
    assert predictions[6].top == () and predictions[6].logits is None
    readable = model.predict(path for number, path in enumerate(images) if number not in (0, 6))
    for one, other in zip(readable, (each for each in predictions if not each.problem), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-6)


def test_predict_with_another_batch_size_differs_by_rounding_only(model, paths):
    others = VisionModel(model.loaded, batch_size=3).predict(paths[:4])
    for one, other in zip(model.predict(paths[:4]), others, strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_predict_gives_the_logits_of_the_resized_images(model, paths):
    predictions = model.predict(paths[:4])
    logits = model(np.stack([prediction.image for prediction in predictions]))
    np.testing.assert_allclose([prediction.logits for prediction in predictions], logits, rtol=1e-4, atol=1e-5)


def test_predict_gives_the_same_for_paths_pillow_images_and_arrays(model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8), 'RGBA')
    exif = Image.Exif()
    exif[0x112] = 6  # rotated by 90 degrees
    picture.save(tmp_path / 'turned.png', exif=exif)
    opened = Image.open(tmp_path / 'turned.png')
    path, text, image, again = model.predict([tmp_path / 'turned.png', f'{tmp_path}/turned.png', opened, opened])
    white = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture).convert('RGB')
    array, = model.predict([np.asarray(white.transpose(Image.Transpose.ROTATE_270))])
    assert (path.name, image.name, array.name) == (str(tmp_path / 'turned.png'), 'image 2', 'image 0')
    for other in (text, image, again, array):
        np.testing.assert_array_equal(path.image, other.image)
        np.testing.assert_allclose(path.logits, other.logits, rtol=1e-5, atol=1e-6)


def test_predict_damaged_pillow_image_is_a_problem_and_other_objects_are_refused(model, paths, tmp_path):
    (tmp_path / 'short.png').write_bytes(paths[0].read_bytes()[:60])
    assert model.predict([Image.open(tmp_path / 'short.png')])[0].problem
    for wrong, message in ((np.zeros((4, 4, 3), np.float32), r'image 0 is float32 \[4, 4, 3\]: give uint8'),
                           (np.zeros((4, 4), np.uint8), r'uint8 \[4, 4\]'), (7, 'image 0 is a int: give a path')):
        with pytest.raises(ValueError, match=message):
            model.predict([wrong])


def test_predict_one_image_or_an_array_of_images(model, tmp_path):
    pixels = tiny.images(1)[0]
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    for image in (str(tmp_path / 'a.png'), tmp_path / 'a.png', Image.fromarray(pixels), pixels):
        prediction, = model.predict(image)
        assert not prediction.problem and prediction.image.shape == (16, 16, 3)
    assert len(model.predict(np.stack([pixels] * 3))) == 3
    with pytest.raises(ValueError, match='give a path, a Pillow image or uint8'):
        model.predict(b'a.png')


def test_predict_guesses_are_sorted_probabilities_of_the_logits(model, paths):
    prediction, = model.predict(paths[:1], top=2)
    probabilities = np.exp(prediction.logits) / np.exp(prediction.logits).sum()
    assert [guess.label for guess in prediction.top] == np.argsort(-probabilities)[:2].tolist()
    assert [guess.name for guess in prediction.top] == [tiny.NAMES[guess.label] for guess in prediction.top]
    np.testing.assert_allclose([guess.probability for guess in prediction.top], np.sort(probabilities)[:0:-1],
                               rtol=1e-5)
    assert len(model.predict(paths[:1])[0].top) == 3  # the number of classes is less than 5
    with pytest.raises(ValueError, match='top=0'):
        model.predict(paths[:1], top=0)


@pytest.mark.parametrize('budget, kept', [
    ({}, 8), ({'keep_rate': 0.25}, 4), ({'keep_rates': [0.5]}, 8), ({'tokens': (3,)}, 3),
    ({'plan': make_plan(16, 2, rate=0.5, reduce_at=(0,), fuse=False)}, 8)])
def test_predict_keeps_the_patches_with_the_most_class_attention(model, paths, budget, kept):
    prediction, = model.with_plan(**budget).predict(paths[:1])
    ids, attention = prediction.kept[0], prediction.attention[0]
    assert ids[:kept].tolist() == np.argsort(-attention)[:kept].tolist()
    assert ids[kept:].tolist() == ([] if 'plan' in budget else [-1])  # the fused token
    assert 0 < attention.sum() < 1


def test_predict_attention_is_nan_for_patches_dropped_before(model, paths):
    prediction, = model.with_plan(plan=make_plan(16, 2, rate=0.5, reduce_at=(0, 1))).predict(paths[:1])
    assert set(np.flatnonzero(~np.isnan(prediction.attention[1]))) == set(prediction.kept[0][:8])
    assert set(prediction.kept[1]) - {-1, -2} < set(prediction.kept[0])
    assert model.with_plan(keep_rate=1.0).predict(paths[:1])[0].kept == ()


def test_predict_attention_is_nan_for_patches_dropped_by_a_merging_reducer(model, paths):
    prediction, = model.with_reducer('tofu').with_plan(r=4).predict(paths[:1])
    dropped = prediction.token_of_patch[0] < 0  # tofu drops tokens in its first blocks
    assert dropped.sum() == 4
    np.testing.assert_array_equal(np.isnan(prediction.attention[1]), dropped)


def test_predict_patch_is_either_kept_or_in_a_fused_token(model, paths):
    prediction, = model.with_plan(plan=make_plan(16, 2, rate=0.5, reduce_at=(0, 1))).predict(paths[:1])
    for kept, attention, fused_weights in zip(prediction.kept, prediction.attention, prediction.fused_weights):
        is_kept = np.isin(np.arange(16), kept)
        assert not (is_kept & (fused_weights > 0)).any()
        dropped_here = ~is_kept & ~np.isnan(attention)
        np.testing.assert_allclose(fused_weights[dropped_here], attention[dropped_here], rtol=1e-6)
    assert ((prediction.fused_weights[0] > 0) == ~np.isin(np.arange(16), prediction.kept[0])).all()


def test_draw_shows_the_image_and_each_reduction(model, paths):
    prediction, broken = model.predict([paths[0], paths[5]])
    assert model.draw(prediction).width > 2 * 16 * 8
    with pytest.raises(ValueError, match='nothing to draw'):
        model.draw(broken)


def test_predict_gives_predictions_pixels_and_kept_patches_of_an_evaluation(paths, tmp_path):
    class Photos(layouts.Colours):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return {'image': paths[index].read_bytes(), 'label': index % 3, 'id': paths[index].name}

    config = layouts.config_of(data__eval_crop=0.8, keep__rate=0.5, batch_size=16, data__max_failed=0.1)
    photos = Photos('test')
    run = experiment.setup(config, sources=(photos, photos), model_config=layouts.SHAPE)
    weights.save(tmp_path, random_params(run.model, 1), run.metadata | {'class_names': tiny.NAMES})
    with PreemptionHandler() as preemption:
        evaluated = results.evaluate_params(run, run.eval_step(), run.trained_state(tmp_path).params, preemption,
                                            sample=99)
    predictions = [each for each in evit_jax.load(tmp_path).predict(paths) if not each.problem]
    labels = [prediction.top[0].label for prediction in predictions]
    assert len(predictions) == len(evaluated.sample['image']) == 20 and len(set(labels)) > 1
    assert labels == evaluated.sample['prediction'].tolist()
    np.testing.assert_array_equal([prediction.image for prediction in predictions], evaluated.sample['image'])
    np.testing.assert_array_equal([prediction.kept[0] for prediction in predictions], evaluated.sample['kept'][0])
