"""Tests of the program that describes data and draws a batch."""

import re

import numpy as np
import pytest
from PIL import Image

from evit_jax.viz.batch import batch_page
from tests.helpers import program_modules, programs
from tests.helpers.encoded import grey_png

describe = program_modules.module_fixture('describe')


def test_batch_page_contains_images_copies_and_mixtures():
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


@pytest.fixture
def run_describe(describe, capsys):
    """Returns a function that runs the program in this process and returns its output."""
    def run(*arguments):
        code, errors = programs.run(describe, (), *arguments)
        assert code == 0, errors
        return capsys.readouterr().out

    return run


def test_describe_prints_both_splits_and_draws_a_batch(run_describe, tmp_path):
    printed = run_describe('--config', 'configs/base.py', '--config.data.source=generated',
                           '--config.model.image_size=32', '--config.model.classes=5', '--sample=20', '--rows=4',
                           '--copies=2', f'--picture={tmp_path / "batch.png"}')
    assert 'train: 10,240 examples, 5 classes' in printed and 'test: 1,024 examples, 5 classes' in printed
    assert 'width 32 to 32' in printed and 'cannot be read (20): 0' in printed
    with Image.open(tmp_path / 'batch.png') as page:
        assert page.width > 5 * 32


def test_describe_check_all_lists_unreadable_images_and_counts_classes(run_describe, tmp_path):
    for split, count in (('train', 6), ('val', 3)):
        for number in range(count):
            file = tmp_path / split / ('cat' if number % 3 else 'dog') / f'{number}.png'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b'torn' if number == 2 else grey_png(20, 30 + number))
    printed = run_describe('--config', 'configs/folder.py', '--config.data.source=folder',
                           f'--config.data.path={tmp_path}', '--config.data.workers=0', '--check_all',
                           f'--picture={tmp_path / "batch.png"}')
    assert re.search('images of a class: 2 to .*; fewest: dog 2, cat [34]\n', printed)
    assert printed.count('cannot be read (all): 1') == 2 and 'train/cat/2.png: not a readable' in printed
