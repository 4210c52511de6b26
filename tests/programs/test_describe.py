"""The survey of a source, and the program that prints it and draws a batch."""

import io
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evit_jax.data.survey import describe_classes, describe_sizes, survey
from evit_jax.viz.batch import batch_page

ROOT = pathlib.Path(__file__).parents[2]


def encoded(width, height, colour=128):
    file = io.BytesIO()
    Image.new('RGB', (width, height), (colour,) * 3).save(file, 'PNG')
    return file.getvalue()


class Some:
    """Example i is 10 + i pixels wide, of class i % 3; every seventh cannot be read."""
    num_classes, class_names, image_size = 3, ('cat', 'dog', 'eel'), None

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        image = b'torn' if index % 7 == 6 else encoded(10 + index, 20)
        return {'image': image, 'label': index % 3, 'id': f'{index}.png', 'mask': np.zeros((20, 10 + index), np.uint8)}


@pytest.mark.parametrize('workers', [0, 1])
def test_a_survey_of_all_finds_every_size_label_and_failure(workers):
    found = survey(Some(100), workers=workers)
    good = [i for i in range(100) if i % 7 != 6]
    assert found.num_surveyed == 100
    assert found.sizes.tolist() == [[10 + i, 20] for i in good]
    assert found.labels.tolist() == [i % 3 for i in good]
    assert [said.split(':')[0] for said in found.failed] == [f'{i}.png' for i in range(6, 100, 7)]


def test_a_sample_is_spread_over_the_whole_source():
    found = survey(Some(1000), 10)
    assert found.num_surveyed == 10 and len(found.sizes) + len(found.failed) == 10
    assert found.sizes[0].tolist() == [10, 20]
    assert np.diff(found.sizes[:, 0]).min() >= 100
    assert survey(Some(4), 10).num_surveyed == 4


def test_what_is_said_of_classes_names_the_rarest_and_the_empty():
    labels = np.array([0] * 9 + [1] * 2 + [3] * 5)
    assert describe_classes(labels, ('cat', 'dog', 'eel', 'fox'), rarest=2) == (
        '0 to 9, median 3; fewest: eel 0, dog 2; 1 classes have none')
    assert describe_classes(np.arange(4), tuple('abcd'), rarest=1) == '1 to 1, median 1; fewest: a 1'


@pytest.mark.parametrize('wrong', [-1, 3])
def test_a_label_outside_the_classes_is_refused(wrong):
    with pytest.raises(ValueError, match=rf'label {wrong} is outside \[0, 2\]'):
        describe_classes(np.array([0, wrong]), tuple('abc'))


def test_what_is_said_of_sizes_is_least_most_and_median():
    said = describe_sizes(np.array([[10, 7], [20, 7], [4000, 9]]))
    assert said == 'width 10 to 4,000, median 20; height 7 to 9, median 7'


def test_a_page_shows_each_image_its_copies_and_their_mixtures_to_the_pixel():
    rng = np.random.default_rng(0)
    stored = [rng.integers(0, 256, (height, 40, 3), dtype=np.uint8) for height in (40, 20)]
    augmented, mixed = (rng.integers(0, 256, (2, 3, 40, 40, 3), dtype=np.uint8) for _ in range(2))
    page = np.asarray(batch_page(stored, augmented, mixed, names=['cat', 'dog'], ids=['a', 'b'], heading='batch'))
    places = [place_of(page, picture) for row in range(2) for picture in (*augmented[row], *mixed[row])]
    rows, columns = np.array(places).reshape(2, 6, 2).transpose(2, 0, 1)
    assert (rows[0] == rows[0, 0]).all() and (rows[1] == rows[1, 0]).all() and rows[1, 0] > rows[0, 0] + 40
    assert (columns[0] == columns[1]).all() and (np.diff(columns[0]) > 40).all()
    assert place_of(page, stored[0]) == (rows[0, 0], 2 * columns[0, 0] - columns[0, 1])
    without = batch_page(stored, augmented, names=['cat', 'dog'], ids=['a', 'b'], heading='batch')
    assert without.width < page.shape[1]


def place_of(page, picture):
    height, width = picture.shape[:2]
    starts = np.argwhere((page[:-height, :-width] == picture[0, 0]).all(-1)).tolist()
    (found,) = [(y, x) for y, x in starts if (page[y:y + height, x:x + width] == picture).all()]
    return found


def describe(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.describe', *arguments], cwd=ROOT, capture_output=True,
                          text=True)


def test_the_program_prints_both_splits_and_draws_a_mixed_batch(tmp_path):
    done = describe('--config', 'configs/base.py', '--config.data.source=generated', '--config.model.image_size=32',
                    '--config.model.classes=5', '--sample=20', '--rows=4', '--copies=2',
                    f'--picture={tmp_path / "batch.png"}')
    assert done.returncode == 0, done.stderr
    assert 'train: 10,240 examples, 5 classes' in done.stdout and 'test: 1,024 examples, 5 classes' in done.stdout
    assert 'width 32 to 32' in done.stdout and 'cannot be read (20): 0' in done.stdout
    with Image.open(tmp_path / 'batch.png') as page:
        assert page.width > 5 * 32


def test_the_program_names_what_cannot_be_read_and_counts_classes_when_it_reads_all(tmp_path):
    for split, count in (('train', 6), ('val', 3)):
        for number in range(count):
            file = tmp_path / split / ('cat' if number % 3 else 'dog') / f'{number}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b'torn' if number == 2 else encoded(20, 30 + number))
    done = describe('--config', 'configs/folder.py', '--config.data.source=folder', f'--config.data.path={tmp_path}',
                    '--config.data.workers=0', '--check_all', f'--picture={tmp_path / "batch.png"}')
    assert done.returncode == 0, done.stderr
    assert re.search('images of a class: 2 to .*; fewest: dog 2, cat [34]\n', done.stdout)
    assert done.stdout.count('cannot be read (all): 1') == 2 and 'train/cat/2.png: not a readable' in done.stdout
