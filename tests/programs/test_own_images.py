"""Tests of training on a folder of images: classes from the data, and broken files."""

import json
import subprocess
import sys

import pytest

from evit_jax import models
from evit_jax.training import loop
from tests.helpers.folders import draw_stripes
from tests.helpers.tiny_run import NARROW, ROOT, SETTINGS
from tests.helpers.tiny_run import config_of as tiny

CLASSES = 'oak', 'pine'
OWN = {'data.source': 'folder', 'model.classes': 0, 'batch_size': 8, 'epochs': 2, 'data.flip': 0.0,
       'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'keep.shrink_epochs': 0, 'optimizer.warmup_epochs': 0.0,
       'log.pictures': 4, 'log.eval_epochs': 9.0}


@pytest.fixture(autouse=True)
def least(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'vit_least', NARROW)


def own(path, **changes):
    own = OWN | {'data.path': str(path), 'model.name': 'vit_least', 'model.reduce_at': (1,)}
    return tiny(**{key.replace('.', '__'): value for key, value in own.items()} | changes)


def test_train_broken_file_is_logged_skipped_and_counted(tmp_path, caplog):
    caplog.set_level('INFO')
    metrics = loop.train(own(draw_stripes(tmp_path / 'images', broken=1), data__max_failed=0.2), tmp_path / 'run')
    assert 'cannot be read: train/oak/broken 0.jpg: not a readable image' in caplog.text
    assert '1 images could not be read and are left out of these metrics' in caplog.text
    assert metrics['left_out'] == 1
    assert round(metrics['top1'] * 8, 6) in range(9)  # eight images are readable
    assert json.loads((tmp_path / 'run' / 'config.json').read_text())['class_names'] == list(CLASSES)


def test_train_too_many_broken_files_raise(tmp_path):
    with pytest.raises(ValueError, match=r'samples could not be read, the last one .*data\.max_failed=0\.05 allows 1'):
        loop.train(own(draw_stripes(tmp_path / 'images', broken=3), data__max_failed=0.05), tmp_path / 'run')


def test_main_absent_folder_exits_with_one_line(tmp_path):
    changed = [f'--config.{key}={value}' for key, value in (SETTINGS | OWN).items()]
    done = subprocess.run([sys.executable, '-m', 'evit_jax.main', '--config', 'configs/base.py', '--workdir',
                           str(tmp_path / 'run'), *changed, f'--config.data.path={tmp_path / "none"}'], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: there is no folder '{tmp_path / 'none'}'"
