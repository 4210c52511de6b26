"""The shortened digits recipe in every layout: equal losses and accuracy, and each resumes the run of another."""

import shutil

import numpy as np
import pytest

from evit_jax.metrics import writers
from tests.helpers import layouts
from tests.helpers.layouts import LAYOUTS

pytestmark = pytest.mark.slow
STEPS, HALF = 50, 25
SHORT = {'epochs': 1, 'batch_size': 200, 'keep.start_epoch': 0, 'keep.shrink_epochs': 0,
         'data.train_split': 'train[:50%]', 'log.every': 1, 'log.eval_epochs': 0.5, 'checkpoint.every': HALF}
CLOSE = 1e-3  # relative, at the last step: differences in rounding grow during training
NAMES = list(LAYOUTS)


def train(workdir, *, processes, devices, sharding='replicated'):
    flags = SHORT | {'sharding': sharding}
    layouts.train(workdir, seconds=1800, processes=processes, devices=devices, module='evit_jax.main', arguments=[
        '--config', 'configs/digits.py', '--workdir', str(workdir),
        *(f'--config.{key}={value}' for key, value in flags.items())])


def last(workdir):
    return writers.read_metrics(workdir / 'metrics.jsonl')[-1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    for name, layout in LAYOUTS.items():
        train(folder / name, **layout)
    return {name: folder / name for name in NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_train_in_every_layout_agrees_with_one_device(trained, name):
    got, want = (np.array(layouts.losses(trained[layout])) for layout in (name, NAMES[0]))
    apart = np.abs(got / want - 1)
    print(f'{name}: loss {want[0]:.4f} -> {want[-1]:.4f}; relative difference {apart[:10].max():.1e} in the first 10 '
          f'steps, {apart.max():.1e} in all; top-1 {last(trained[name])["eval/top1"]:.4f}')
    assert len(want) == STEPS and apart[:10].max() < 1e-5 and apart.max() < CLOSE
    assert last(trained[name])['eval/top1'] == last(trained[NAMES[0]])['eval/top1']


@pytest.mark.parametrize(('before', 'name'), zip(NAMES, NAMES[1:] + NAMES[:1]))
def test_train_resumed_in_the_next_layout_agrees(trained, tmp_path, before, name):
    workdir = tmp_path / 'run'
    left_out = shutil.ignore_patterns('metrics.jsonl', 'best', str(STEPS))
    shutil.copytree(trained[before], workdir, ignore=left_out)
    train(workdir, **LAYOUTS[name])
    np.testing.assert_allclose(layouts.losses(workdir), layouts.losses(trained[before])[HALF:], rtol=CLOSE)
    assert last(workdir)['eval/top1'] == last(trained[before])['eval/top1']
