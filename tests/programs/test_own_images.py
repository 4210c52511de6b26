"""A folder of one's own images through the program: classes from the data, broken files counted, too many refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evit_jax import models
from evit_jax.training import loop
from tests.training.test_finetuning import LEAST
from tests.training.test_training import ROOT, SETTINGS, tiny

CLASSES = 'oak', 'pine'
OWN = {'data.source': 'folder', 'model.classes': 0, 'batch_size': 8, 'epochs': 2, 'data.flip': 0.0,
       'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'keep.shrink_epochs': 0, 'optimizer.warmup_epochs': 0.0,
       'log.pictures': 4, 'log.eval_epochs': 9.0}


@pytest.fixture(autouse=True)
def least(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_least', LEAST)


def draw(folder, broken=0):
    """24 images to train on and 8 to evaluate on, stripes across or down, and some files that are no images."""
    for split, count in (('train', 12), ('val', 4)):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                rng = np.random.default_rng([label, number])
                stripes = np.repeat(rng.integers(0, 256, (10, 1, 3), np.uint8), 40, axis=1).repeat(3, axis=0)
                picture = Image.fromarray(stripes if label else stripes.swapaxes(0, 1))
                picture.save(folder / split / name / f'{number}.{"jpg" if number % 2 else "png"}')
    for number in range(broken):
        for split in ('train', 'val'):
            (folder / split / 'oak' / f'broken {number}.jpg').write_bytes(b'\xff\xd8 no image')
    return folder


def own(path, **changes):
    own = OWN | {'data.path': str(path), 'model.name': 'vit_least', 'model.reduce_at': (1,)}
    return tiny(**{key.replace('.', '__'): value for key, value in own.items()} | changes)


def test_a_broken_file_is_named_left_out_and_counted(tmp_path, caplog):
    caplog.set_level('INFO')
    metrics = loop.train(own(draw(tmp_path / 'images', broken=1), data__max_failed=0.2), tmp_path / 'run')
    assert 'cannot be read: train/oak/broken 0.jpg: not a readable image' in caplog.text
    assert '1 images could not be read and are left out of these figures' in caplog.text
    assert metrics['left_out'] == 1
    assert round(metrics['top1'] * 8, 6) in range(9)  # of the eight that could be read
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['class_names'] == list(CLASSES)


def test_too_many_broken_files_stop_the_run_and_say_which_key_allows_more(tmp_path):
    with pytest.raises(ValueError, match=r'samples could not be read, the last one .*data\.max_failed=0\.05 allows 1'):
        loop.train(own(draw(tmp_path / 'images', broken=3), data__max_failed=0.05), tmp_path / 'run')


def test_a_folder_that_is_not_there_ends_the_program_with_one_line(tmp_path):
    changed = [f'--config.{key}={value}' for key, value in (SETTINGS | OWN).items()]
    done = subprocess.run([sys.executable, '-m', 'evit_jax.main', '--config', 'configs/base.py', '--workdir',
                           str(tmp_path / 'run'), *changed, f'--config.data.path={tmp_path / "none"}'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: there is no folder '{tmp_path / 'none'}'"
