"""Tests of token targets: RoI-align, the sparse softmax, and the crops and augmentations of maps."""

import math

import numpy as np
import pytest
from PIL import Image

from evit_jax.data.token_labels import label_maps
from evit_jax.data.token_labels import targets as token_targets
from evit_jax.data.token_labels.label_maps import Entry, LabelMap, LabelMaps, LabelMapsMetadata
from evit_jax.data.token_labels.roi_align import align, axis_weights
from evit_jax.data.token_labels.targets import TokenTargets, sparse_softmax
from evit_jax.data.transforms import augment
from evit_jax.data.transforms.geometry import CropWindow, TrainTransform
from tests.helpers.toys import assert_same, train

BOXES = [(0, 0, 1, 1), (0.1, 0.35, 0.7, 0.9), (0.5, 0, 0.51, 0.02), (0, 0.8, 0.3, 1), (0.013, 0.2, 0.987, 0.77)]
CLASSES, SIDE = 30, 6


def roi_align(dense, box, bins):
    """RoI-align as in torchvision, sample by sample; the box is in cells, (left, top, right, bottom)."""
    height, width, _ = dense.shape
    left, top, right, bottom = box
    high, wide = max(bottom - top, 1), max(right - left, 1)
    out = np.zeros((bins, bins, dense.shape[2]))
    down, across = math.ceil(high / bins), math.ceil(wide / bins)
    for p in range(bins):
        for q in range(bins):
            for i in range(down):
                for j in range(across):
                    y = top + p * high / bins + (i + 0.5) * high / bins / down
                    x = left + q * wide / bins + (j + 0.5) * wide / bins / across
                    out[p, q] += bilinear(dense, y, x) / (down * across)
    return out


def bilinear(dense, y, x):
    height, width, _ = dense.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0
    y, x = max(y, 0), max(x, 0)
    low, near = min(int(y), height - 1), min(int(x), width - 1)
    high, far = min(low + 1, height - 1), min(near + 1, width - 1)
    down, right = (y - low) * (low < height - 1), (x - near) * (near < width - 1)
    return ((1 - down) * (1 - right) * dense[low, near] + (1 - down) * right * dense[low, far]
            + down * (1 - right) * dense[high, near] + down * right * dense[high, far])


def random_map(seed=0, classes=CLASSES, top=5, side=SIDE):
    rng = np.random.default_rng(seed)
    index = np.argsort(rng.random((classes, side, side)), axis=0)[:top]
    return LabelMap(-np.sort(-rng.normal(2, 3, (top, side, side)), axis=0).astype(np.float16), index)


def write(folder, maps, classes=CLASSES, ids=None, **changes):
    """Writes the maps for the examples 'number 0', 'number 1', ..., and opens them."""
    metadata = {'annotator': 'test', 'data': 'test', 'class_names': (), 'classes': classes, 'examples': len(maps),
             'top': maps[0].value.shape[0], 'grid': maps[0].value.shape[1:]} | changes
    ids = ids or [f'number {number}' for number in range(len(maps))]
    label_maps.write(folder, LabelMapsMetadata(**metadata), lambda start: map(Entry, ids[start:], maps[start:]))
    return LabelMaps(folder)


def dense_of(value, index, classes=CLASSES):
    """Returns dense targets by the definition of `TokenTargets`."""
    dense = np.zeros((*value.shape[:-1], classes))
    for place in np.ndindex(value.shape):
        dense[*place[:-1], index[place]] += value[place]
    return dense + (1 - value.sum(-1, keepdims=True)) / classes


def softmax(logits):
    chance = np.exp(logits - logits.max(-1, keepdims=True))
    return chance / chance.sum(-1, keepdims=True)


def whole(label_map, classes=CLASSES):
    """Returns the map as [G, G, L], with 0 for classes without a value."""
    dense = np.zeros((*label_map.value.shape[1:], classes), np.float32)
    np.put_along_axis(dense, label_map.index.transpose(1, 2, 0), label_map.value.transpose(1, 2, 0), -1)
    return dense


@pytest.mark.parametrize('box', BOXES)
@pytest.mark.parametrize('bins', [1, 4, 9])
def test_align_equals_torchvision_written_as_loops(box, bins):
    dense = np.random.default_rng(0).normal(size=(SIDE, SIDE, 3)).astype(np.float32)
    top, left, bottom, right = box
    got = align(dense, axis_weights(top, bottom, SIDE, bins), axis_weights(left, right, SIDE, bins))
    cells = [edge * SIDE - 0.5 for edge in (left, top, right, bottom)]
    np.testing.assert_allclose(got, roi_align(dense, cells, bins), atol=1e-5)


@pytest.mark.parametrize('bins', [1, 3, 8])
def test_align_of_a_linear_map_returns_the_centres_of_the_bins(bins):
    centres = (np.arange(SIDE) + 0.5) / SIDE
    plane = np.stack(np.meshgrid(centres, centres, indexing='ij'), -1).astype(np.float32)
    top, left, bottom, right = 0.1, 0.35, 0.7, 0.9  # within the centres of the outer cells
    got = align(plane, axis_weights(top, bottom, SIDE, bins), axis_weights(left, right, SIDE, bins))
    middle = (np.arange(bins) + 0.5) / bins
    want = np.meshgrid(top + middle * (bottom - top), left + middle * (right - left), indexing='ij')
    np.testing.assert_allclose(got, np.stack(want, -1), atol=1e-6)


def test_align_of_the_whole_map_to_its_own_grid_returns_it():
    np.testing.assert_array_equal(axis_weights(0, 1, SIDE, SIDE), np.eye(SIDE))


@pytest.mark.parametrize('box', BOXES)
@pytest.mark.parametrize('mirrored', [False, True])
def test_token_targets_equal_the_softmax_of_the_aligned_map(tmp_path, monkeypatch, box, mirrored):
    monkeypatch.setattr(token_targets, 'MAX_CLASSES', CLASSES)
    targets = TokenTargets(write(tmp_path, [random_map()]), (4, 4))
    rows = targets.rows('number 0', CropWindow(*box, mirrored))
    dense = whole(random_map())[:, ::-1] if mirrored else whole(random_map())
    top, left, bottom, right = box
    left, right = (1 - right, 1 - left) if mirrored else (left, right)
    for of, bins in (('token', 4), ('label', 1)):
        want = softmax(roi_align(dense, [edge * SIDE - 0.5 for edge in (left, top, right, bottom)], bins))
        got = dense_of(rows[f'{of}_value'], rows[f'{of}_index'])
        np.testing.assert_allclose(got.reshape(bins, bins, CLASSES), want, atol=1e-5)


def test_sparse_softmax_spreads_the_remaining_probability_and_sums_to_1(tmp_path):
    rows = TokenTargets(write(tmp_path, [random_map(top=9)]), (4, 4)).rows('number 0', CropWindow(0, 0, 1, 1, False))
    got = dense_of(rows['token_value'], rows['token_index'])
    want = softmax(align(whole(random_map(top=9)), *[axis_weights(0, 1, SIDE, 4)] * 2)).reshape(16, CLASSES)
    likely = np.sort(want)[:, [-token_targets.MAX_CLASSES]]
    np.testing.assert_allclose(got[want >= likely], want[want >= likely], atol=1e-6)
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)
    for row, chance in enumerate(want):
        rest = got[row][chance < likely[row]]
        np.testing.assert_allclose(rest, chance[chance < likely[row]].mean(), atol=1e-6)


@pytest.mark.parametrize('total, stay', [(3, 3), (3, 2), (50, 10), (4, 4)])
def test_sparse_softmax_few_classes_are_padded_with_0(total, stay):
    logits = np.array([[2.0, -1.0, 300.0], [0.5, 0.0, -200.0]], np.float32)
    value, place = sparse_softmax(logits, total, stay)
    assert value.shape == place.shape == (2, stay) and np.isfinite(value).all()
    assert (place[:, 3:] == 3).all() and (value[:, 3:] == 0).all()
    assert place[0, 0] == 2 and place[1, 0] == 0


@pytest.mark.parametrize('grid', [(4, 4), (2, 4)])
def test_token_targets_follow_the_crop_of_the_image(grid, tmp_path):
    """Each cell of the image has a distinct colour and class, so the colour of a token identifies its target."""
    cells, pixels, height, width = 8, 16, grid[0] * 16, grid[1] * 16
    numbers = np.arange(cells * cells).reshape(1, cells, cells)
    maps = write(tmp_path, [LabelMap(np.full(numbers.shape, 30.0), numbers)], classes=cells * cells)
    image = np.zeros((cells, cells, 3), np.uint8)
    image[..., 0], image[..., 1] = np.mgrid[:cells, :cells] * 30
    image = image.repeat(pixels, 0).repeat(pixels, 1)
    targets, transform = TokenTargets(maps, grid), TrainTransform((height, width), scale=(0.2, 0.6), policy='none')
    seen = set()
    for seed in range(30):
        shown, part = transform.crop_and_augment(image, np.random.default_rng(seed))
        rows = targets.rows('number 0', part)
        best = rows['token_index'][:, 0].reshape(grid)
        middle = shown[8::16, 8::16].astype(int)  # centre of each token
        assert abs(best // cells * 30 - middle[..., 0]).max() <= 45
        assert abs(best % cells * 30 - middle[..., 1]).max() <= 45
        seen.add(part.mirrored)
    assert seen == {False, True}


@pytest.mark.parametrize('name', ['Rotate', 'ShearX', 'ShearY', 'TranslateXRel', 'TranslateYRel'])
@pytest.mark.parametrize('share', [0.9, -0.5])
@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_source_positions_follow_the_ops_of_rand_augment(name, share, size):
    height, width = size
    x, y = np.meshgrid(*((np.arange(side) + 0.5) / side for side in (width, height)))
    picture = Image.fromarray(np.stack([x * 255, y * 255, x * 0 + 255], -1).astype(np.uint8))
    drawn = ('Invert', 1.0), (name, share), ('Invert', 1.0), ('TranslateXRel', 0.2)
    outcome = np.asarray(augment.apply_ops(picture, drawn)).astype(float)
    from_x, from_y, inside = augment.source_positions(x, y, drawn, aspect=width / height)
    within = (np.minimum(from_x, from_y) > 0.06) & (np.maximum(from_x, from_y) < 0.94) & inside
    assert within.mean() > 0.2 and (~inside).mean() > 0.08
    assert abs(outcome[..., 0] - from_x * 255)[within].max() < 3
    assert abs(outcome[..., 1] - from_y * 255)[within].max() < 3
    assert (outcome[..., 2][~inside] != 255).mean() > 0.9


def test_token_targets_follow_ops_and_are_uniform_outside_the_image(tmp_path):
    numbers = np.arange(16).reshape(1, 4, 4)
    targets = TokenTargets(write(tmp_path, [LabelMap(np.full(numbers.shape, 9.0), numbers)], classes=16), (4, 4))
    still, moved = (targets.rows('number 0', CropWindow(0, 0, 1, 1, False, drawn)) for drawn in (
        (), (('TranslateXRel', 0.25 / 0.45),)))
    np.testing.assert_array_equal(still['token_index'][:, 0].reshape(4, 4), numbers[0])
    np.testing.assert_array_equal(moved['token_index'][:, 0].reshape(4, 4)[:, :3], numbers[0][:, 1:])
    np.testing.assert_allclose(moved['token_value'].reshape(4, 4, -1)[:, 3], 0, atol=1e-7)
    assert not {0, 4, 8, 12} & set(moved['label_index'][moved['label_value'] > 1e-3].tolist())


def test_crop_and_augment_equals_a_call_and_draws_as_much():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    for policy in ('rand-m9-mstd0.5-inc1', 'jitter', '3a'):
        called, asked = np.random.default_rng(1), np.random.default_rng(1)
        transform = TrainTransform(32, policy=policy)
        np.testing.assert_array_equal(transform(image, called), transform.crop_and_augment(image, asked)[0])
        assert called.random() == asked.random()


@pytest.fixture(scope='module')
def numbered(tmp_path_factory):
    return TokenTargets(write(tmp_path_factory.mktemp('maps'), [random_map(seed) for seed in range(10)]), (2, 2))


def test_train_batches_contain_the_targets_of_their_examples(numbered):
    transform = TrainTransform(8, policy='none')
    plain, told = (train(10, transform=transform, targets=targets) for targets in (None, numbered))
    assert_same([{name: batch[name] for name in plain[0]} for batch in told], plain)
    assert told[0].keys() - plain[0].keys() == set(numbered.shapes)
    for batch in told:
        for name, (shape, dtype) in numbered.shapes.items():
            assert batch[name].shape == (4, *shape) and batch[name].dtype == dtype
    still = TrainTransform(8, scale=None, flip=0, policy='none')
    for batch in train(10, transform=still, targets=numbered):
        for row, label in enumerate(batch['label'].tolist()):
            want = numbered.rows(f'number {label}', CropWindow(0, 0, 1, 1, False))
            for name in want:
                np.testing.assert_array_equal(batch[name][row], want[name])


@pytest.mark.parametrize('changes', [{'num_workers': 2}, {'start_step': 3, 'repeats': 3}])
def test_train_batches_targets_depend_on_seed_and_step(numbered, changes):
    repeats = changes.get('repeats', 1)
    arguments = {'transform': TrainTransform(8), 'targets': numbered, 'repeats': repeats}
    assert_same(train(10, **arguments | changes), train(10, **arguments)[changes.get('start_step', 0):])


def test_train_batches_example_without_a_map_is_replaced_and_reported(tmp_path):
    maps = [random_map(seed) for seed in range(9)] + [None]
    ids = [f'number {number}' for number in range(10)]
    metadata = LabelMapsMetadata('test', 'test', (), CLASSES, 10, 5, (SIDE, SIDE))
    label_maps.write(tmp_path, metadata, lambda start: map(Entry, ids[start:], maps[start:]))
    batches = train(10, transform=TrainTransform(8), targets=TokenTargets(LabelMaps(tmp_path), (2, 2)))
    failed = np.concatenate([batch['failed'] for batch in batches]).tolist()
    assert 2 <= len(failed) <= 3 and all('no label map of example \'number 9\'' in why for why in failed)
    assert 9 not in np.concatenate([batch['label'] for batch in batches])


def test_label_maps_duplicate_ids_raise(tmp_path):
    maps = [random_map(seed) for seed in range(3)]
    with pytest.raises(ValueError, match='1 duplicate ids, so a map may be that of another example: give each example'):
        write(tmp_path, maps, ids=['a.jpg', 'b.jpg', 'a.jpg'])
