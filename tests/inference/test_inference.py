"""What was trained, at work: the predictions of an evaluation, whatever the batch and however an image comes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.best import BestCheckpoint
from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.inference import Predictor, load, load_model
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import experiment, results, step
from tests.helpers import layouts

CONFIG = {'data__eval_crop': 0.8, 'keep__rate': 0.5, 'batch_size': 16, 'log__pictures': 0, 'data__max_failed': 0.1}
NAMES = 'red', 'green', 'blue'
SIZES = [(40, 30), (16, 16), (9, 50), (33, 32)]


class Photos(layouts.Colours):
    """Files of several sizes, and one that is none."""

    def __init__(self, folder):
        self.paths = [folder / f'{number}.{"jpg" if number % 2 else "png"}' for number in range(21)]
        for number, path in enumerate(self.paths):
            pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).resize(SIZES[number % len(SIZES)]).save(path)
        self.paths[5].write_bytes(b'\xff\xd8 no image')

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return {'image': self.paths[index].read_bytes(), 'label': index % 3, 'id': self.paths[index].name}


least = layouts.least


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    return Photos(tmp_path_factory.mktemp('photos'))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """Weights that nobody trained, as a run of `CONFIG` would leave them."""
    folder = tmp_path_factory.mktemp('weights')
    params = models.create(dataclasses.replace(layouts.SHAPE, classes=3)).init(jax.random.key(1))
    weights.save(folder, params, {'config': layouts.config_of(**CONFIG).to_dict(), 'class_names': NAMES})
    return folder


@pytest.fixture(scope='module')
def model(workdir):
    return load(workdir, batch_size=8)


def labels(predictions):
    return [prediction.top[0].label for prediction in predictions if not prediction.problem]


def test_predictions_pixels_and_kept_patches_are_those_of_an_evaluation(workdir, model, photos):
    laid = experiment.setup(layouts.config_of(**CONFIG), sources=(photos, photos))
    with PreemptionHandler() as stopping:
        found = results.evaluate_params(laid, laid.eval_step(), laid.trained_state(workdir).params, stopping, sample=99)
    predictions = [prediction for prediction in model.predict(photos.paths) if not prediction.problem]
    assert len(predictions) == len(found.sample['image']) == 20
    np.testing.assert_array_equal([prediction.image for prediction in predictions], found.sample['image'])
    assert labels(predictions) == found.sample['prediction'].tolist()
    assert len(set(labels(predictions))) > 1
    np.testing.assert_array_equal([prediction.kept[0] for prediction in predictions], found.sample['kept'][0])


def test_an_unreadable_image_has_a_reason_in_its_place_and_changes_no_other(model, photos):
    paths = [photos.paths[0].with_name('none.png'), *photos.paths]
    found = model.predict(paths)
    assert [prediction.name for prediction in found] == list(map(str, paths))
    assert [number for number, prediction in enumerate(found) if prediction.problem] == [0, 6]
    assert found[0].problem == 'No such file or directory'
    assert 'not a readable image' in found[6].problem and found[6].top == () and found[6].logits is None
    alone = model.predict(path for number, path in enumerate(paths) if number not in (0, 6))
    for one, other in zip(alone, (prediction for prediction in found if not prediction.problem), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-5, atol=1e-6)


def test_the_batch_size_changes_nothing_but_rounding(model, workdir, photos):
    want = model.predict(photos.paths[:4])
    for one, other in zip(want, load(workdir, batch_size=3).predict(photos.paths[:4]), strict=True):
        np.testing.assert_allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)


def test_each_plan_is_compiled_once_however_many_images_come(workdir, photos, monkeypatch):
    traced, normalise = [], step.normalise

    def record(images, **how):
        traced.append(images.shape)
        return normalise(images, **how)

    monkeypatch.setattr(step, 'normalise', record)
    model = load(workdir, batch_size=4)
    for count in (1, 4, 5, 4):
        assert len(model.predict(photos.paths[:count])) == count
    assert traced == [(4, 16, 16, 3)]
    model.predict(photos.paths[:2], rate=1.0)
    assert len(traced) == 2


def test_a_path_a_pillow_image_and_an_array_are_the_same_image(model, tmp_path):
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


def test_a_damaged_pillow_image_is_unreadable_and_what_is_no_image_is_refused(model, photos, tmp_path):
    (tmp_path / 'short.png').write_bytes(photos.paths[0].read_bytes()[:60])
    assert model.predict([Image.open(tmp_path / 'short.png')])[0].problem
    for wrong, said in ((np.zeros((4, 4, 3), np.float32), r'image 0 is float32 \[4, 4, 3\]: give uint8'),
                        (np.zeros((4, 4), np.uint8), r'uint8 \[4, 4\]'), (7, 'image 0 is a int: give a path')):
        with pytest.raises(ValueError, match=said):
            model.predict([wrong])


def test_guesses_are_in_order_with_the_probabilities_of_the_logits(model, photos):
    found, = model.predict(photos.paths[:1], top=2)
    want = np.exp(found.logits) / np.exp(found.logits).sum()
    assert [guess.label for guess in found.top] == np.argsort(-want)[:2].tolist()
    assert [guess.name for guess in found.top] == [NAMES[guess.label] for guess in found.top]
    np.testing.assert_allclose([guess.probability for guess in found.top], np.sort(want)[:0:-1], rtol=1e-5)
    assert len(model.predict(photos.paths[:1])[0].top) == 3  # there are no five classes
    with pytest.raises(ValueError, match='top=0'):
        model.predict(photos.paths[:1], top=0)


@pytest.mark.parametrize('asked, kept', [
    ({}, 8), ({'rate': 0.25}, 4), ({'rates': [0.5]}, 8), ({'tokens': (3,)}, 3),
    ({'plan': make_plan(16, 2, rate=0.5, reduce_at=(0,), fuse=False)}, 8)])
def test_the_patches_kept_are_those_of_most_class_attention(model, photos, asked, kept):
    found, = model.predict(photos.paths[:1], **asked)
    ids, attention = found.kept[0], found.attention[0]
    assert ids[:kept].tolist() == np.argsort(-attention)[:kept].tolist()
    assert ids[kept:].tolist() == ([] if 'plan' in asked else [-1])  # the fused token
    assert 0 < attention.sum() < 1


def test_attention_is_there_for_the_patches_that_are(model, photos):
    plan = make_plan(16, 2, rate=0.5, reduce_at=(0, 1))
    found, = model.predict(photos.paths[:1], plan=plan)
    assert set(np.flatnonzero(~np.isnan(found.attention[1]))) == set(found.kept[0][:8])
    assert set(found.kept[1]) - {-1, -2} < set(found.kept[0])
    assert model.predict(photos.paths[:1], rate=1.0)[0].kept == ()


def test_larger_images_take_other_plans(model, photos):
    larger = Predictor(model.trained._replace(image_size=32), batch_size=1)
    found, = larger.predict(photos.paths[:1])
    assert found.image.shape == (32, 32, 3) and found.kept[0].shape == (33,)


def test_a_drawing_has_the_image_and_what_each_reduction_keeps(model, photos):
    found, broken = model.predict([photos.paths[0], photos.paths[5]])
    assert model.draw(found).width > 2 * 16 * 8
    with pytest.raises(ValueError, match='nothing to draw'):
        model.draw(broken)


@pytest.mark.parametrize('asked, said', [
    ({'rate': 1.5}, r'keep rate 1.5 is outside \(0, 1\]'), ({'rate': 0.0}, 'keep rate 0.0'),
    ({'rates': (0.5, 0.5)}, r'2 values for 1 reductions'), ({'tokens': (0,)}, '0 tokens cannot be kept'),
    ({'rate': 0.5, 'tokens': (3,)}, 'only one of rate and tokens')])
def test_a_plan_that_cannot_be_is_refused(model, asked, said):
    with pytest.raises(ValueError, match=said):
        model.trained.plan(**asked)


def test_a_rate_for_a_model_without_reductions_is_refused(model):
    dense = model.trained._replace(budget=model.trained.budget._replace(reduce_at=(), rates=()))
    assert not dense.plan().reductions
    with pytest.raises(ValueError, match=r'drops nothing at any block .* leave rate out'):
        dense.plan(rate=0.5)


def test_a_run_its_best_and_its_average_are_read(tmp_path):
    laid = experiment.setup(layouts.config_of(keep__rates=(0.75,)))
    state = laid.new_state()
    state = state._replace(step=jnp.int32(7), ema=jax.tree.map(lambda leaf: leaf + 1, state.ema))
    workdirs.write_config(tmp_path, laid.metadata)
    checkpoints, best = CheckpointManager(tmp_path, keep=1), BestCheckpoint(tmp_path, 'top1')
    checkpoints.save(state, laid.metadata)
    best.offer(state._replace(step=jnp.int32(3)), {'top1': 0.5}, laid.metadata)
    checkpoints.close()
    best.close()
    newest, average, top = (load_model(tmp_path), load_model(tmp_path, ema=True), load_model(tmp_path / 'best'))
    jax.tree.map(np.testing.assert_array_equal, newest.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, average.params, state.ema)
    assert (newest.path, newest.name, newest.step, top.step) == (str(tmp_path), 'vit_layouts', 7, 3)
    assert (newest.eval_crop, newest.class_names) == (1.0, NAMES)
    assert newest.plan() == make_plan(16, 2, rate=0.75, reduce_at=(1,))


def test_what_a_checkpoint_does_not_say_is_as_in_deit(tmp_path):
    params = models.create(models.get_config('vit_layouts')).init(jax.random.key(0))
    weights.save(tmp_path, params, {'config': {'model': {'name': 'vit_layouts', 'reduce_at': (1,)}}, 'class_names': []})
    trained = load_model(tmp_path)
    assert (trained.mean, trained.eval_crop, trained.budget.rates) == ((0.485, 0.456, 0.406), 0.875, (1.0,))
    assert trained.class_names[207] == 'golden retriever'  # 1,000 classes
    with pytest.raises(ValueError, match='holds no moving average'):
        load_model(tmp_path, ema=True)
    weights.save(tmp_path / 'other', params, {'config': {'model': {'name': 'vit_layouts'}}, 'class_names': NAMES})
    with pytest.raises(ValueError, match='names 3 classes, its model tells 1000 apart'):
        load_model(tmp_path / 'other')


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, workdir, monkeypatch):
    (tmp_path / 'weights.pth').write_bytes(b'')
    for name, said in (('none', 'there is no folder .*none'), ('weights.pth', 'is a file: .* evit_jax.convert'),
                       ('', 'holds no checkpoint')):
        with pytest.raises(ValueError, match=said):
            load_model(tmp_path / name)
    monkeypatch.setitem(models.CONFIGS, 'vit_layouts', dataclasses.replace(layouts.SHAPE, width=32))
    with pytest.raises(ValueError, match='do not fit this model'):
        load_model(workdir)
    monkeypatch.delitem(models.CONFIGS, 'vit_layouts')
    with pytest.raises(ValueError, match="unknown model 'vit_layouts'"):
        load_model(workdir)
