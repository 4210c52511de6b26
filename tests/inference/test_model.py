"""VisionModel: logits, features and predictions, independent of the batch and of the form of the images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.inference.model import VisionModel
from evit_jax.models import vit
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import experiment, results, step
from tests.helpers import layouts, tiny

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


@pytest.fixture
def traced(monkeypatch):
    """The plans of the programs that are traced."""
    plans, call = [], vit.ViT.__call__

    def record(self, images, plan, **options):
        plans.append(plan)
        return call(self, images, plan, **options)

    monkeypatch.setattr(vit.ViT, '__call__', record)
    return plans


def normalised(images, model):
    return np.asarray(step.normalise(images, model.loaded.mean, model.loaded.std))


def test_call_with_uint8_and_with_normalised_floats_gives_the_same_logits(model):
    images = tiny.images(3)
    logits = model(images)
    assert logits.shape == (3, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(model(normalised(images, model)), logits, atol=1e-5)
    np.testing.assert_allclose(model(jnp.asarray(images)), logits, atol=1e-5)


def test_call_compiles_once_for_each_plan_and_batch_shape(traced):
    model = tiny.model()
    half = model.with_plan(keep_rate=0.5)
    for _ in range(3):
        model(tiny.images(8)), half(tiny.images(8)), model.with_plan(keep_rate=0.5)(tiny.images(8, seed=1))
    assert len(traced) == 1  # 0.5 is the model's own plan
    model(tiny.images(16))
    assert len(traced) == 2
    model.with_plan(keep_rate=0.25)(tiny.images(16))
    model.with_reducer('tome')(tiny.images(16))
    model.with_plan(keep_rate=0.25)(tiny.images(16))
    assert [plan.counts[-1] for plan in traced] == [9, 9, 5, 8]


def test_predict_compiles_once_for_each_plan_whatever_the_number_of_images(paths, traced):
    model = tiny.model(batch_size=4)
    for count in (1, 4, 6, 4):
        assert len(model.predict(paths[:count])) == count
    assert len(traced) == 1
    model.with_plan(keep_rate=1.0).predict(paths[:2])
    assert len(traced) == 2


@pytest.mark.parametrize('images, message', [
    (np.zeros((2, 32, 32, 3), np.uint8), r'32 x 32, the model takes 16 x 16: resize them, or use .*_size\(32\)'),
    (np.zeros((2, 16, 24, 3), np.uint8), '16 x 24'), (np.zeros((16, 16, 3), np.uint8), r'shape \[16, 16, 3\]'),
    (np.zeros((2, 16, 16, 3), int), 'images are int64: give uint8, or normalised floats'),
    (np.zeros((0, 16, 16, 3), np.uint8), 'no images')])
def test_call_with_wrong_images_is_refused(model, images, message):
    with pytest.raises(ValueError, match=message):
        model(images)


def test_forward_gives_features_that_the_head_maps_to_the_logits(model):
    images = tiny.images(2)
    output = model.forward(images)
    head = model.params['head']
    np.testing.assert_allclose(output.features @ head['kernel'] + head['bias'], output.logits, atol=1e-5)
    np.testing.assert_allclose(output.logits, model(images), atol=1e-5)
    assert output.features.shape == (2, 32) and output.patch_tokens.shape == (2, 9, 32)
    assert [array.shape for array in (output.kept[0], output.class_attention[0], output.token_of_patch[0])] == [
        (2, 9), (2, 16), (2, 16)]


def test_apply_is_differentiable_and_calls_trace_within_jit(model):
    images = normalised(tiny.images(2), model)
    gradient = jax.grad(lambda x: model.apply(model.params, x).logits[:, 0].sum())(images)
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    np.testing.assert_allclose(jax.jit(model)(images), model(images), atol=1e-5)


def test_unpool_gives_each_patch_the_token_that_holds_it(model):
    output = model.forward(tiny.images(2))
    dense = model.unpool(output.patch_tokens, output.token_of_patch)
    assert dense.shape == (2, 4, 4, 32)
    for row, kept in enumerate(np.asarray(output.kept[0])):
        patches = dense[row].reshape(16, 32)
        for index, patch in enumerate(kept[:-1]):
            np.testing.assert_array_equal(patches[patch], output.patch_tokens[row, index])
        dropped = np.setdiff1d(np.arange(16), kept)
        np.testing.assert_array_equal(patches[dropped], np.broadcast_to(output.patch_tokens[row, -1], (8, 32)))


def test_unpool_of_dropped_patches_is_nan(model):
    output = model.with_plan(plan=make_plan(16, 2, rate=0.5, reduce_at=(1,), fuse=False)).forward(tiny.images(1))
    dense = np.asarray(model.unpool(output.patch_tokens, output.token_of_patch[0])).reshape(16, 32)
    absent = np.isnan(dense).all(1)
    assert set(np.flatnonzero(~absent)) == set(np.asarray(output.kept[0])[0].tolist()) and absent.sum() == 8


def test_unpool_without_reductions_reshapes_the_tokens(model):
    output = model.with_plan(keep_rate=1.0).forward(tiny.images(1))
    dense = model.unpool(output.patch_tokens, output.token_of_patch)
    np.testing.assert_array_equal(dense.reshape(1, 16, 32), output.patch_tokens)


@pytest.mark.parametrize('budget, counts', [
    ({'keep_rate': 0.25}, (16, 5)), ({'keep_rates': [0.75]}, (16, 13)), ({'tokens': (3,)}, (16, 4)),
    ({'macs': 0.8}, None), ({'plan': make_plan(16, 2, rate=0.5, reduce_at=(0,), fuse=False)}, (8, 8))])
def test_with_plan_takes_one_budget_of_any_kind(model, budget, counts):
    other = model.with_plan(**budget)
    assert counts is None or other.plan.counts == counts
    assert other.macs < model.with_plan(keep_rate=1.0).macs and other.params is model.params
    if 'macs' in budget:
        assert other.macs / model.with_plan(keep_rate=1.0).macs == pytest.approx(0.8, abs=0.03)


def test_with_reducer_keeps_the_budget_and_takes_names_and_reducers(model):
    by_name = model.with_plan(keep_rate=0.75).with_reducer('tome')
    assert by_name.plan.reducer.merges and by_name.plan.counts == (16, 12)
    assert model.with_reducer(by_name.plan.reducer).plan.reducer == by_name.plan.reducer
    assert by_name.with_plan(r=2).plan.counts == (14, 12)
    assert model.with_reducer(None) is model
    with pytest.raises(ValueError, match='unknown reducer'):
        model.with_reducer('nearest')


def test_repr_names_size_plan_and_cost(model):
    assert all(part in repr(model) for part in ('custom', 'M parameters', '3 classes', '16 > 9 tokens', 'MACs', '%'))


def test_with_image_size_takes_larger_images(model):
    larger = model.with_image_size(32)
    assert larger(tiny.images(2, size=32)).shape == (2, 3) and larger.plan.patches == 64
    prediction, = larger.predict(tiny.images(1)[0])
    assert prediction.image.shape == (32, 32, 3) and prediction.kept[0].shape == (33,)
    with pytest.raises(ValueError, match='image size 30 is not divisible'):
        model.with_image_size(30)


def test_batch_size_less_than_one_is_refused():
    with pytest.raises(ValueError, match='batch_size=0 is less than 1'):
        tiny.model(batch_size=0)


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


def test_predict_takes_paths_pillow_images_and_arrays_alike(model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), np.uint8), 'RGBA')
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
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


def test_save_and_load_of_an_own_architecture_give_the_same_logits(tmp_path):
    config = evit_jax.ViTConfig(image_size=24, patch_size=6, width=48, depth=3, heads=4, classes=3, mlp_ratio=2.0)
    model = evit_jax.create_model(config, keep_rate=0.6, class_names=tiny.NAMES).with_plan(tokens=(12, 9, 5))
    model.save(tmp_path / 'saved')
    again = evit_jax.load(tmp_path / 'saved')
    images = tiny.images(2, size=24)
    np.testing.assert_array_equal(again(images), model(images))
    assert (again.config, again.plan, again.class_names) == (config, model.plan, tiny.NAMES)
    assert again.loaded._replace(path='', params={}) == model.loaded._replace(params={})
    with pytest.raises(ValueError, match='holds a checkpoint already'):
        model.save(tmp_path / 'saved')


def test_lvvit_computes_without_batch_norm_and_keeps_its_parameters():
    config = evit_jax.LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=3, stem_width=4)
    model = evit_jax.create_model(config, reduce_at=(1,))
    assert 'bn1' in model.params['patch_embed'] and not model.config.batchnorm_folded
    lowered = model.compiled(2)._jitted['logits'].lower(
        model.loaded.fold_batchnorm().params, tiny.images(2), model.plan)
    assert lowered.as_text().count('stablehlo.rsqrt ') == 2 * config.depth + 1  # only layer norms
    images = tiny.images(2)
    np.testing.assert_allclose(model(images), model.apply(model.params, images).logits, atol=1e-5)


def test_predict_gives_predictions_pixels_and_kept_patches_of_an_evaluation(paths, tmp_path, monkeypatch):
    class Photos(layouts.Colours):
        def __len__(self):
            return len(paths)

        def __getitem__(self, index):
            return {'image': paths[index].read_bytes(), 'label': index % 3, 'id': paths[index].name}

    layouts.prepare(monkeypatch)
    config = layouts.config_of(data__eval_crop=0.8, keep__rate=0.5, batch_size=16, data__max_failed=0.1)
    params = models.create(dataclasses.replace(layouts.SHAPE, classes=3)).init(jax.random.key(1))
    weights.save(tmp_path, params, {'config': config.to_dict(), 'class_names': tiny.NAMES})
    photos = Photos('test')
    run = experiment.setup(config, sources=(photos, photos))
    with PreemptionHandler() as preemption:
        evaluated = results.evaluate_params(run, run.eval_step(), run.trained_state(tmp_path).params, preemption,
                                            sample=99)
    predictions = [each for each in evit_jax.load(tmp_path).predict(paths) if not each.problem]
    labels = [prediction.top[0].label for prediction in predictions]
    assert len(predictions) == len(evaluated.sample['image']) == 20 and len(set(labels)) > 1
    assert labels == evaluated.sample['prediction'].tolist()
    np.testing.assert_array_equal([prediction.image for prediction in predictions], evaluated.sample['image'])
    np.testing.assert_array_equal([prediction.kept[0] for prediction in predictions], evaluated.sample['kept'][0])
