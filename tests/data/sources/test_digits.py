import os
import pathlib
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from evit_jax.data.sources import DigitsSource, digits
from evit_jax.data.transforms.decode import decode

SIZES = {'train': 12, 'test': 5}


@pytest.fixture(autouse=True, scope='module')
def small_bank():
    """Reduces the number of pieces. Everything else is as in the real data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, 'BANK', 96)
        digits.clutter_bank.cache_clear()
        yield
    digits.clutter_bank.cache_clear()


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    path = tmp_path_factory.mktemp('built')
    digits.prepare(path, SIZES)
    return path


def records(path, split, sizes=SIZES):
    source = DigitsSource(path, split, sizes)
    return [source[i] for i in range(len(source))]


def test_digits_source_fingerprint_is_independent_of_the_spelling_of_the_split(built):
    splits = (['test', 'test[:100%]', 'test[0:5]'], ['train[:50%]', 'train[:6]'], ['train[6:]'], ['train'])
    found = [{DigitsSource(built, split, SIZES).fingerprint for split in same} for same in splits]
    assert [len(same) for same in found] == [1] * 4 and len(set.union(*found)) == 4


def test_prepare_stores_example_i_at_position_i_and_is_reproducible(built, tmp_path):
    digits.prepare(tmp_path, SIZES)
    for split, size in SIZES.items():
        first, second = records(built, split), records(tmp_path, split)
        assert len(first) == len(second) == size
        for i, (a, b) in enumerate(zip(first, second)):
            np.testing.assert_array_equal(a['image'], b['image'])
            made = digits.example(0, split, i)
            assert (a['mask'], a['label'], a['id']) == (b['mask'], b['label'], b['id'])
            assert (a['mask'], a['label'], a['id']) == (made['mask'], made['label'], made['id'])
            np.testing.assert_array_equal(a['image'], decode(made['image']))


BLANK = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)


def test_example_depends_on_seed_split_and_index(monkeypatch):
    drawn = []
    monkeypatch.setattr(digits, 'render', lambda rng, digit, clutter: drawn.append(rng.random()) or BLANK)
    for key in ((0, 'train', 0), (1, 'train', 0), (0, 'test', 0), (0, 'train', 1), (0, 'train', 0)):
        digits.example(*key)
    assert len(set(drawn)) == 4
    assert drawn[0] == drawn[4]


def test_prepare_other_sizes_or_seeds_have_separate_folders(built):
    assert len(records(built, 'test', {'train': 12, 'test': 4})) == 4
    assert len(records(built, 'test')) == 5
    other = digits.prepare(built, SIZES, seed=1)
    assert other.data_path != digits.prepare(built, SIZES).data_path


def test_split_digits_test_digits_are_absent_from_training(monkeypatch):
    images, labels = digits.source_digits()
    train, test = digits.split_digits('train'), digits.split_digits('test')
    assert not set(train) & set(test)
    assert sorted([*train, *test]) == list(range(len(images)))
    assert len(test) == digits.TEST_DIGITS
    pieces, cut_from, curves = digits.clutter_bank(0)
    assert set(cut_from) <= set(train)
    number_of = {id(piece): number for piece, number in zip(pieces, cut_from)} | {id(curve): -1 for curve in curves}
    seen = {}
    monkeypatch.setattr(
        digits, 'render', lambda rng, digit, clutter: seen.update(digit=digit, clutter=clutter) or BLANK)
    for split, pool in (('train', train), ('test', test)):
        indices = np.flatnonzero(np.isin(train, cut_from)).tolist() if split == 'train' else range(60)
        for index in indices:
            made = digits.example(0, split, index)
            number = int(made['id'][-4:])
            assert number in pool
            assert made['label'] == labels[number]
            np.testing.assert_array_equal(seen['digit'], images[number])
            assert number not in [number_of[id(strokes)] for strokes in seen['clutter']]


def test_example_uses_each_source_digit_equally_often():
    size = len(digits.split_digits('test'))
    objects = [int(digits.split_digits('test')[i % size]) for i in range(size)]
    assert [int(digits.example(0, 'test', i)['id'][-4:]) for i in range(0, size, 40)] == objects[::40]
    assert len(set(objects)) == size


def test_render_mask_covers_the_whole_digit():
    images, _ = digits.source_digits()
    clutter, _, curves = digits.clutter_bank(0)
    for index in range(20):
        alone, mask = digits.render(np.random.default_rng(index), images[index], [])
        among, same = digits.render(np.random.default_rng(index), images[index], [*curves[:4], *clutter[:40]])
        np.testing.assert_array_equal(mask, same)
        core = np.asarray(Image.fromarray(mask).filter(ImageFilter.MinFilter(3))) > 0
        moved = np.abs(alone.astype(int) - among).max(-1) > 2 * digits.NOISE
        assert core.sum() > 15
        assert not moved[core].any()  # the same ink on any background
        assert moved.mean() > 0.1


def test_render_digit_lies_within_the_canvas_with_the_given_size():
    images, _ = digits.source_digits()
    heights = []
    for index in range(200):
        _, mask = digits.render(np.random.default_rng(index), images[index], [])
        assert set(np.unique(mask)) == {0, 255}
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        edge = digits.DIGIT_MARGIN + 1  # a sprite has a blank rim
        assert min(rows[0], columns[0]) >= edge
        assert max(rows[-1], columns[-1]) < digits.CANVAS - edge
        heights.append(rows[-1] - rows[0] + 1)
    assert digits.DIGIT_HEIGHT[0] - 1 <= np.mean(heights) <= digits.DIGIT_HEIGHT[1]
    assert min(heights) >= 17


def test_render_digit_contrasts_with_the_background():
    images, _ = digits.source_digits()
    for index in range(50):
        image, mask = digits.render(np.random.default_rng(index), images[index], [])
        luma = image @ np.array([0.299, 0.587, 0.114])
        object_, ground = np.median(luma[mask > 0]), np.median(luma[mask == 0])
        assert object_ - ground > digits.INK_CONTRAST - digits.TEXTURE


def test_cut_never_returns_the_whole_digit():
    images, _ = digits.source_digits()
    rng = np.random.default_rng(0)
    for digit in images[:300]:
        piece = digits.cut(rng, digit)
        kept = piece > 0
        assert kept.any()
        np.testing.assert_array_equal(piece[kept], digit[kept])
        assert piece.sum() <= 0.75 * digit.sum()
        assert kept.any(1).sum() <= digits.PIECE_CELLS[1] and kept.any(0).sum() <= digits.PIECE_CELLS[1]


def test_example_equals_the_recorded_pixels_of_this_version():
    """Fails if the drawing changes. Then raise digits.VERSION, and record the new values here."""
    images, _ = digits.source_digits()
    rng = np.random.default_rng(0)
    clutter = [digits.curve(rng), *(digits.sprite(rng, digits.cut(rng, digit)) for digit in images[10:30])]
    image, mask = digits.render(rng, images[0], clutter)
    blocks = image.mean(-1).reshape(4, 16, 4, 16).mean((1, 3))
    assert digits.VERSION == '1.3.0'
    np.testing.assert_allclose(blocks, [
        [130, 64, 60, 92],
        [97, 70, 94, 59],
        [78, 95, 81, 71],
        [53, 58, 86, 73],
    ], atol=1)
    assert abs(int((mask > 0).sum()) - 137) <= 4


def test_prepare_killed_build_is_built_again(tmp_path):
    program = f"""
import os, signal
from evit_jax.data.sources import digits
digits.BANK, make = 96, digits.example
digits.example = lambda seed, split, i: make(seed, split, i) if i < 5 else os.kill(os.getpid(), signal.SIGKILL)
digits.prepare({str(tmp_path)!r}, {SIZES!r})
"""
    root = pathlib.Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, '-c', program], cwd=root, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-500:]
    assert list(tmp_path.rglob('*incomplete*'))
    assert [len(records(tmp_path, split)) for split in SIZES] == [12, 5]


def test_prepare_two_builds_at_once_keep_one(tmp_path, monkeypatch):
    make, inner = digits.example, []

    def example(seed, split, index):
        if (split, index) == ('test', 3) and not inner:
            inner.append(True)
            inner.append(digits.prepare(tmp_path, SIZES))
        return make(seed, split, index)

    monkeypatch.setattr(digits, 'example', example)
    builder = digits.prepare(tmp_path, SIZES)
    assert builder.info.splits['train'].num_examples == 12
    assert inner[1].data_path == builder.data_path
    assert not list(tmp_path.rglob('*incomplete*'))
    assert len(records(tmp_path, 'train')) == 12


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_prepare_folder_without_permission_raises(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        digits.prepare(tmp_path / 'data', SIZES)


def test_prepare_path_of_a_file_raises(tmp_path):
    (tmp_path / 'data').write_text('')
    with pytest.raises(OSError, match='data'):
        digits.prepare(tmp_path / 'data', SIZES)


@pytest.mark.parametrize('sizes', [{'train': 3}, {'train': 3, 'test': 0}, {'train': 3, 'test': 1, 'dev': 1}])
def test_prepare_invalid_sizes_raise(tmp_path, sizes):
    with pytest.raises(ValueError, match="'train' and 'test'"):
        digits.prepare(tmp_path, sizes)


def test_digits_source_is_picklable_and_its_cached_images_are_read_only(built):
    source = DigitsSource(built, 'test', SIZES)
    first = source[3]
    again = pickle.loads(pickle.dumps(source))[3]
    np.testing.assert_array_equal(first['image'], again['image'])
    assert first['id'] == again['id']
    with pytest.raises(ValueError, match='read-only'):
        first['image'][0] = 0
    first['label'] = -1
    assert source[3]['label'] == again['label']
