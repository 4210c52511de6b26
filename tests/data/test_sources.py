import io
import logging

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from evit_jax.data import progress, splits
from evit_jax.data.sources import open_source
from evit_jax.data.sources.generated import GeneratedSource


def generated(**changes):
    return GeneratedSource(**{'split': 'train', 'image_size': 8, 'num_classes': 5, 'encoded': (500, 375), 'size': 40}
                           | changes)


def test_generated_files_have_the_size_asked_for_and_weigh_what_photographs_do():
    source = generated()
    pictures = {source[i]['image'] for i in range(40)}
    assert 1 < len(pictures) <= 10
    assert source.image_size is None
    for picture in pictures:
        assert simplejpeg.decode_jpeg(picture, 'RGB').shape == (375, 500, 3)
        assert 80_000 < len(picture) < 140_000
    assert {source[i]['id'] for i in range(40)} == {generated(encoded=None)[i]['id'] for i in range(40)}
    assert {source[i]['label'] for i in range(40)} == set(range(5))


def test_generated_files_are_smooth_as_photographs_are():
    """Amplitudes fall with frequency: octave by octave, the power of neighbouring differences grows with distance."""
    pixels = np.asarray(Image.open(io.BytesIO(generated()[0]['image'])).convert('L')).astype(float)
    power = [np.mean((pixels[:, step:] - pixels[:, :-step]) ** 2) for step in (1, 4, 16, 64)]
    assert power == sorted(power) and power[3] > 4 * power[0]


def test_generated_files_are_a_function_of_the_seed():
    assert generated()[3]['image'] == generated()[3]['image'] != generated(seed=1)[3]['image']
    assert generated(encoded=(40, 30))[0]['image'] != generated()[0]['image']


def test_generated_files_without_extent_are_refused():
    with pytest.raises(ValueError, match=r'encoded=\(0, 10\)'):
        generated(encoded=(0, 10))


@pytest.mark.parametrize('split, have, meaning', [
    ('train', ['train', 'validation', 'test'], 'train'),
    ('auto', ['train', 'validation', 'test'], 'validation'),
    ('auto', ['train', 'val', 'test'], 'val'),
    ('auto', ['test', 'train'], 'test'),
    ('test', ['train', 'validation', 'val', 'test'], 'test'),
    ('val', ['train', 'validation', 'val', 'test'], 'val'),
    ('test', ['train', 'val'], 'test'),
    ('test', ['train'], 'test'),
    ('train', ['train'], 'train[:90%]'),
    ('auto', ['train'], 'train[90%:]'),
    ('test[:100%]', ['train', 'validation', 'test'], 'test[:100%]'),
    ('train[:100%]', ['train'], 'train[:100%]'),
    ('train[:80%]', ['train', 'test'], 'train[:80%]'),
])
def test_resolve_of_a_split_is_what_the_data_have(split, have, meaning):
    assert splits.resolve(split, have) == meaning


@pytest.mark.parametrize('size', [1, 2, 7, 10, 99, 1001])
def test_parts_of_a_split_meet_without_gap(size):
    for percent in range(0, 101, 9):
        found = []
        for split in (f'a[:{percent}%]', f'a[{percent}%:]'):
            try:
                found += splits.parts(split, {'a': size})
            except ValueError as error:
                assert 'holds no examples' in str(error)
        assert [i for part in found for i in range(part.start, part.stop)] == list(range(size))


def test_slices_of_stored_digits_are_refused_where_there_is_no_such_split(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        open_source('digits', 'dev[:10%]', path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_generated_images_are_cut_at_the_end_only():
    assert len(open_source('generated', 'train[:640]', num_classes=5)) == 640
    with pytest.raises(ValueError, match=r"'train\[640:\]': generated images are cut at the end only"):
        open_source('generated', 'train[640:]', num_classes=5)


def test_overlapping_parts_are_counted_and_neighbours_are_not():
    sizes = {'train': 100, 'test': 50}
    def shared(a, b):
        return splits.overlap(splits.parts(a, sizes), splits.parts(b, sizes))
    assert shared('train[:90%]', 'train[90%:]') == shared('train', 'test') == 0
    assert shared('train[:95%]', 'train[90%:]') == 5
    assert shared('train+test', 'test[10:20]') == 10


def test_progress_tells_rate_and_time_left_every_few_seconds(monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: clock[0])
    said = progress.Progress('copying', 4000, 'MB', done=1000)  # which an earlier run had done
    with caplog.at_level(logging.INFO):
        for _ in range(12):
            clock[0] += 1
            said.add(20)
    assert [record.getMessage() for record in caplog.records] == [
        'copying: 1,100 of 4,000 MB, 20 a second, 2 min left', 'copying: 1,200 of 4,000 MB, 20 a second, 2 min left']
