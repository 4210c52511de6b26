"""Tests of crops and resizing against values recorded with timm 0.4.12, and torchvision's rule."""

import hashlib
import itertools
import json
import math
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from evit_jax.data.transforms import augment, geometry
from evit_jax.data.transforms.geometry import EvalTransform, TrainTransform
from tests.helpers.recipe_rule import make_image

GOLDEN = pathlib.Path(__file__).parents[2] / 'golden_recipe'
EVALUATION = json.loads((GOLDEN / 'eval_transform.json').read_text())
CROPS = json.loads((GOLDEN / 'statistics.json').read_text())['random_resized_crop']
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
ODD_SHAPES = [(1, 1), (1, 300), (300, 1), (5, 7), (3, 20_000), (30_001, 2), (224, 224), (401, 300)]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize('case', EVALUATION['images'], ids=lambda case: f"{case['width']}x{case['height']}")
def test_eval_transform_equals_the_recorded_crop(case):
    image = make_image(case['width'], case['height'], case['rule_seed'])
    assert hashlib.sha256(image.tobytes()).hexdigest() == case['input_sha256']
    got = EvalTransform(224)(image)
    recorded = np.load(GOLDEN / 'eval_transform.npz')[f"crop_stride4_{case['width']}x{case['height']}"]
    np.testing.assert_array_equal(got[::4, ::4], recorded)
    assert hashlib.sha256(got.tobytes()).hexdigest() == case['crop_sha256']


@pytest.mark.parametrize('row', EVALUATION['geometry_table'], ids=lambda row: f"{row['width']}x{row['height']}")
def test_eval_transform_equals_the_recorded_geometry(row, monkeypatch):
    seen = []

    def resize(self, size, resample):
        seen.append(list(size))
        return Image.new(self.mode, size)

    monkeypatch.setattr(Image.Image, 'resize', resize)
    monkeypatch.setattr(Image.Image, 'crop', lambda self, box: seen.append(list(box)) or self)
    EvalTransform(224)(np.zeros((row['height'], row['width'], 3), np.uint8))
    left, top = row['crop_left_top']
    assert seen == [row['resized_wh'], [left, top, left + 224, top + 224]]


@pytest.mark.parametrize('size', [224, 240, 256, 272, 288, 304, 384, 448])
def test_eval_transform_short_side_is_256_224_of_the_size(size, monkeypatch):
    seen = []
    monkeypatch.setattr(Image.Image, 'resize', lambda self, size, resample: seen.append(size) or Image.new('RGB', size))
    EvalTransform(size)(np.zeros((640, 640, 3), np.uint8))
    assert seen == [(int(256 / 224 * size),) * 2]


@pytest.mark.parametrize('transform', [EvalTransform(224), EvalTransform(97, crop=0.9), EvalTransform(64, crop=None)])
@pytest.mark.parametrize('height, width', [(375, 500), (700, 301), (12, 9), (10, 400)])
def test_eval_transform_mask_follows_the_image(transform, height, width):
    mask = np.zeros((height, width), np.uint8)
    mask[height // 5:height // 2, width // 2:width * 9 // 10] = 255
    image = transform(np.repeat(mask[..., None], 3, 2))
    got = transform.mask(mask)
    assert got.dtype == bool and got.shape == (transform.size, transform.size) and got.any()
    assert ((image[..., 0] > 127) != got).mean() < 0.01


@pytest.mark.parametrize('shape', ODD_SHAPES)
@pytest.mark.parametrize('transform', [EvalTransform(224), EvalTransform(64, crop=1.0), EvalTransform(64, crop=None)])
def test_eval_transform_accepts_every_shape(shape, transform):
    image = noise(*shape)
    got = transform(image)
    assert got.shape == (transform.size, transform.size, 3) and got.dtype == np.uint8
    assert transform.mask(image[..., 0]).shape == got.shape[:2]
    if shape == (1, 1):
        assert (got == image[0, 0]).all()


@pytest.mark.parametrize('long', [9 * 40, 9 * 40 + 1])
def test_eval_transform_slender_image_is_independent_of_its_ends(long, monkeypatch):
    image = noise(9, long)
    for way_up in (image, image.swapaxes(0, 1)):
        cut = EvalTransform(64)(way_up)
        with monkeypatch.context() as patch:
            patch.setattr(geometry, 'SLENDER', 1000)
            np.testing.assert_allclose(cut, EvalTransform(64)(way_up), atol=1)


def test_eval_transform_slender_image_is_cut_before_resizing(monkeypatch):
    seen = []
    monkeypatch.setattr(Image.Image, 'resize', lambda self, size, resample: seen.append(size) or Image.new('RGB', size))
    EvalTransform(224)(np.zeros((1_000_000, 1, 3), np.uint8))
    assert seen == [(256, 256 * 16)]


@pytest.mark.parametrize(('shape', 'size', 'crop', 'resized', 'left_top'), [
    ((375, 500), (192, 384), 0.875, (438, 328), (27, 68)), ((500, 375), (192, 384), 0.875, (438, 584), (27, 196)),
    ((300, 301), (384, 192), 1.0, (385, 384), (96, 0)), ((100, 700), (128, 256), 0.9, (994, 142), (369, 7))])
def test_eval_transform_of_a_rectangle_equals_timm(shape, size, crop, resized, left_top, monkeypatch):
    """The geometry is that of timm 1.0.31: `ResizeKeepRatio` and `CenterCrop`."""
    seen = []
    monkeypatch.setattr(Image.Image, 'resize', lambda self, size, resample: seen.append(size) or Image.new('RGB', size))
    monkeypatch.setattr(Image.Image, 'crop', lambda self, box: seen.append(box) or self)
    EvalTransform(size, crop=crop)(np.zeros((*shape, 3), np.uint8))
    left, top = left_top
    assert seen == [resized, (left, top, left + size[1], top + size[0])]


@pytest.mark.parametrize('crop', [0.9, None])
@pytest.mark.parametrize('shape', ODD_SHAPES)
def test_eval_transform_of_a_rectangle_accepts_every_shape(shape, crop):
    transform = EvalTransform((48, 96), crop=crop)
    image = transform(noise(*shape))
    assert image.shape == (48, 96, 3) and transform.mask(noise(*shape)[..., 0]).shape == (48, 96)


@pytest.mark.parametrize('name', ['nearest', 'bilinear', 'bicubic', 'lanczos', 'box', 'hamming'])
@pytest.mark.parametrize('crop', [1.0, None])
def test_eval_transform_resizes_by_the_filter_of_pillow(name, crop):
    image = noise(60, 60)
    expected = Image.fromarray(image).resize((40, 40), Image.Resampling[name.upper()])
    np.testing.assert_array_equal(EvalTransform(40, crop=crop, interpolation=name)(image), expected)


def test_train_transform_of_a_rectangle_returns_that_size():
    for policy in ('rand-m9-mstd0.5-inc1', 'jitter', '3a'):
        transform = TrainTransform((48, 96), policy=policy)
        assert transform(noise(70, 50), np.random.default_rng(0)).shape == (48, 96, 3)


def test_eval_transform_without_a_crop_returns_the_whole_image():
    image = noise(40, 60)
    whole = EvalTransform(32, crop=None)
    np.testing.assert_array_equal(whole(image), geometry.resize(image, 32))
    assert EvalTransform(40, crop=None)(image[:, :40]).tobytes() == image[:, :40].tobytes()


@pytest.mark.parametrize('run', [run for run in CROPS['runs'] if run['draws'] == 20_000],
                         ids=lambda run: f"{run['width']}x{run['height']}")
def test_random_crop_has_the_recorded_statistics(run):
    width, height, draws = run['width'], run['height'], run['draws']
    rng = np.random.default_rng(0)
    top, left, down, across = np.array(
        [geometry.random_crop(rng, height, width, SCALE, RATIO) for _ in range(draws)]).T
    assert (top >= 0).all() and (left >= 0).all() and (down >= 1).all() and (across >= 1).all()
    assert (top + down <= height).all() and (left + across <= width).all()
    drawn = {
        'area_share': down * across / (height * width),
        'log_w_over_h': np.log(across / down),
        'top_over_range': (top / np.maximum(height - down, 1))[down < height],
        'left_over_range': (left / np.maximum(width - across, 1))[across < width],
    }
    central = geometry.central_crop(height, width, RATIO)
    if run['fallback_count'] > 1:
        fallback = (np.stack([top, left, down, across], 1) == central).all(1)
        share = run['fallback_share']
        assert abs(fallback.mean() - share) < 4 * math.sqrt(2 * share * (1 - share) / draws)
        drawn['left_over_range'] = (left / (width - across))[~fallback]  # the record omits fallback crops too
    for name, values in drawn.items():
        want = run[name]
        assert abs(values.mean() - want['mean']) < 4 * math.sqrt(2) * want['stderr_of_mean'], name
        assert abs(values.std() - want['std']) < 4 * math.sqrt(2) * want['stderr_of_mean'], name
    whole_height = draws - run['top_over_range']['n']
    assert abs((down == height).sum() - whole_height) < 4 * math.sqrt(2 * whole_height)
    for level, want in run['area_share_quantiles'].items():
        assert abs(np.quantile(drawn['area_share'], float(level)) - want) < 0.015, level


@pytest.mark.parametrize('height, width', [(1, 1), (1, 2), (3, 1)])
def test_random_crop_of_a_tiny_image_is_not_empty(height, width):
    for seed in range(100):
        crop = geometry.random_crop(np.random.default_rng(seed), height, width, SCALE, RATIO)
        assert crop[2] >= 1 and crop[3] >= 1


@pytest.mark.parametrize('case', CROPS['forced_fallback'], ids=lambda case: f"{case['width']}x{case['height']}")
def test_random_crop_that_does_not_fit_is_the_central_crop(case):
    want = tuple(case[key] for key in ('top', 'left', 'crop_height', 'crop_width'))
    assert geometry.central_crop(case['height'], case['width'], RATIO) == want


@pytest.mark.parametrize('shape', ODD_SHAPES)
@pytest.mark.parametrize('transform', [TrainTransform(224), TrainTransform(32, policy='3a', colour_jitter=0.3),
                                       TrainTransform(16, scale=None, policy='jitter')])
def test_train_transform_accepts_every_shape(shape, transform):
    for seed in range(3):
        got = transform(noise(*shape), np.random.default_rng(seed))
        assert got.shape == (transform.size, transform.size, 3) and got.dtype == np.uint8


def test_train_transform_crops_resizes_flips_and_augments_in_order():
    image, policy = noise(375, 500), augment.from_policy('rand-m9-mstd0.5-inc1')
    mirrored = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        top, left, height, width = geometry.random_crop(rng, 375, 500, SCALE, RATIO)
        want = Image.fromarray(image).crop((left, top, left + width, top + height)).resize((96, 96), 3)
        if rng.random() < 0.5:
            mirrored += 1
            want = want.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        want = policy(want, rng)
        np.testing.assert_array_equal(TrainTransform(96)(image, np.random.default_rng(seed)), np.asarray(want))
    assert 3 < mirrored < 17


@pytest.mark.parametrize('flip, share', [(0, 0), (0.5, 0.5), (1, 1)])
def test_train_transform_flips_with_the_given_probability(flip, share):
    image = noise(8, 8)
    transform = TrainTransform(8, scale=None, flip=flip, policy='none')
    rng = np.random.default_rng(0)
    made = [transform(image, rng).tobytes() for _ in range(400)]
    assert set(made) <= {image.tobytes(), image[:, ::-1].tobytes()}
    assert abs(np.mean([one == image[:, ::-1].tobytes() for one in made]) - share) < 0.1


def test_train_transform_for_digits_applies_the_jitter_to_the_whole_image():
    transform = TrainTransform(64, scale=None, flip=0, policy='jitter')
    for side in (64, 48):
        image = noise(side, side)
        want = geometry.jitter(geometry.resize(image, 64), np.random.default_rng(5))
        np.testing.assert_array_equal(transform(image, np.random.default_rng(5)), want)


@pytest.mark.parametrize('transform', [TrainTransform(32), TrainTransform(32, policy='3a', colour_jitter=0.3),
                                       TrainTransform(32, scale=None, flip=0, policy='jitter')])
def test_train_transform_same_generator_returns_the_same_image_after_pickling(transform):
    image, sent = noise(50, 40), pickle.loads(pickle.dumps(transform))
    assert sent == transform
    made = [transform(image, np.random.default_rng(seed)).tobytes() for seed in range(10)]
    assert made == [sent(image, np.random.default_rng(seed)).tobytes() for seed in range(10)]
    assert len(set(made)) == 10
    assert image.tobytes() == noise(50, 40).tobytes()


def test_eval_transform_returns_the_same_image_after_pickling():
    sent = pickle.loads(pickle.dumps(EvalTransform(32)))
    np.testing.assert_array_equal(sent(noise(50, 40)), EvalTransform(32)(noise(50, 40)))


@pytest.mark.parametrize('make, message', [
    (lambda: TrainTransform(0), 'size=0'), (lambda: EvalTransform(-1), 'size=-1'),
    (lambda: TrainTransform(8, scale=(0, 1)), r'scale=\(0, 1\).*within \(0, 1\]'),
    (lambda: TrainTransform(8, scale=(0.5, 0.2)), 'scale='), (lambda: TrainTransform(8, scale=(0.5, 2)), 'scale='),
    (lambda: TrainTransform(8, ratio=(2, 1)), r'ratio=\(2, 1\)'), (lambda: TrainTransform(8, flip=1.5), 'flip=1.5'),
    (lambda: TrainTransform(8, policy='rnd'), "unknown augmentation policy 'rnd'"),
    (lambda: TrainTransform(8, policy='none', colour_jitter=-1), 'colour_jitter=-1'),
    (lambda: EvalTransform(8, interpolation='bicub'), "unknown interpolation 'bicub': did you mean bicubic"),
    (lambda: EvalTransform(8, crop=0), r'crop=0 is outside \(0, 1\]'), (lambda: EvalTransform(8, crop=1.1), 'crop=1.1'),
])
def test_transforms_arguments_out_of_range_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_jitter_shift_reflects_the_border():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), 'reflect')
    windows = {padded[y:y + 9, x:x + 7, order].tobytes()
               for y in range(7) for x in range(7) for order in itertools.permutations(range(3))}
    seen = {geometry.jitter(image, np.random.default_rng(i), shift=3, contrast=0, brightness=0).tobytes()
            for i in range(400)}
    assert seen <= windows
    assert len(seen) > 150


def test_jitter_same_generator_returns_the_same_image_in_range():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    first, second = (geometry.jitter(image, np.random.default_rng(3), shift=2, brightness=200) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape and first.dtype == np.uint8
    for i in range(20):  # all pixels move in the same direction; none wraps around
        one = geometry.jitter(image, np.random.default_rng(i), shift=0, contrast=0, brightness=255)
        change = np.sort(one.astype(int), -1) - np.sort(image.astype(int), -1)
        assert (change >= 0).all() or (change <= 0).all()
