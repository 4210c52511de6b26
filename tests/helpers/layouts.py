"""A short training on any number of processes and virtual devices, started as `python -m tests.helpers.layouts`."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import base
from evit_jax import cli, models
from evit_jax.data import sources, splits
from evit_jax.metrics import writers
from evit_jax.models.config import ViTConfig
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.training import loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 10
# Wide enough that FSDP divides its largest kernels (64 x 256) and leaves the others whole.
SHAPE = ViTConfig(image_size=16, patch_size=4, width=64, depth=2, heads=2, init_std=0.1)
# Drop path and erasing draw for each image by itself; mixup and cutmix, which draw for each device, are off.
SETTINGS = {
    'batch_size': 64, 'epochs': 5, 'ema_decay': 0.9, 'compilation_cache': '', 'model.name': 'vit_layouts',
    'model.image_size': 16, 'model.classes': 3, 'model.dtype': 'float32', 'model.reduce_at': (1,),
    'data.augment': 'none', 'data.crop': (), 'data.eval_crop': 1.0, 'data.repeats': 1, 'data.workers': 0,
    'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'optimizer.lr': 5e-2, 'optimizer.warmup_epochs': 1.0,
    'optimizer.clip_norm': 1.0, 'log.every': 1, 'log.eval_epochs': 2.0, 'log.pictures': 2, 'checkpoint.every': 5}


class Colours:
    """Noise with a bright stripe whose colour is the class; it is the object. The test split fills no batch."""
    num_classes, class_names, image_size = 3, ('red', 'green', 'blue'), 16
    sizes = {'train': 128, 'test': 100}
    broken = False

    def __init__(self, split):
        self.split = splits.resolve(split, self.sizes)
        if not len(self):
            raise FileNotFoundError('there is no folder')

    def __len__(self):
        return self.sizes[self.split]

    def __getitem__(self, index):
        if self.broken and index % 4 == 0:
            raise OSError('disk error')
        rng, label = np.random.default_rng([index, self.split == 'test']), index % 3
        image, mask = rng.integers(0, 128, (16, 16, 3), np.uint8), np.zeros((16, 16), np.uint8)
        mask[rng.integers(12):][:6] = 255
        image[..., label] += mask // 8
        return {'image': image, 'label': label, 'id': str(index), 'mask': mask}


def config_of(**changes):
    config = base.get_config()
    config.update_from_flattened_dict(SETTINGS | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


def prepare(patch):
    """The least model and data, for the time of a patch."""
    patch.setitem(models.CONFIGS, 'vit_layouts', SHAPE)
    patch.setattr(sources, 'open_source', lambda name, split, **_: Colours(split))


@pytest.fixture(scope='module', autouse=True)
def least():
    """The least model and data for a test file that says `least = layouts.least`."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        yield


def train_here(workdir, **changes):
    """Trains to the end in this process, on its devices; the final metrics."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        return loop.train(config_of(**changes), workdir)


def records(workdir):
    """What was logged of the steps."""
    return [record for record in writers.read_metrics(workdir / 'metrics.jsonl') if 'train/loss' in record]


def losses(workdir):
    return [record['train/loss'] for record in records(workdir)]


def cut_off(workdir, to, step=5):
    """Makes another folder what the workdir was when the checkpoint of a step had been written."""
    (to / 'checkpoints').mkdir(parents=True)
    shutil.copy(workdir / 'config.json', to)
    shutil.copytree(workdir / 'checkpoints' / str(step), to / 'checkpoints' / str(step))


def start(workdir, *, processes, devices, module='tests.helpers.layouts', arguments=(), **changes):
    """Starts the processes of a training; each writes its log beside the workdir.

    Args:
      module: with its arguments, what is run.
      changes: changed settings; `broken_in`, the process whose disk is broken; `second`, differences in process
        1: settings, or the number of `examples` (0: there are no data).
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}',
        'LAYOUT': json.dumps([str(workdir), changes])}
    started = []
    for number in range(processes):
        if processes > 1:
            environment |= {'COORDINATOR_ADDRESS': f'localhost:{port}', 'NUM_PROCESSES': str(processes),
                            'PROCESS_ID': str(number)}
        with open(f'{workdir}.{number}.log', 'a') as log:
            started.append(subprocess.Popen([sys.executable, '-m', module, *arguments], cwd=ROOT,
                                            env=environment, stdout=log, stderr=log))
    return started


def wait(started, seconds=300):
    """The exit codes, once all have ended; none is left behind."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0)) for process in started]
    finally:
        for process in started:
            process.kill()


def train(workdir, *, seconds=300, **how):
    """Trains to the end in other processes; of what they leave the metrics are in the workdir."""
    codes = wait(start(workdir, **how), seconds)
    logs = [pathlib.Path(f'{workdir}.{number}.log').read_text()[-3000:] for number in range(len(codes))]
    assert not any(codes), '\n'.join(logs)


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen in time'
        time.sleep(0.1)


def main():
    """One process of a training."""
    workdir, changes = json.loads(os.environ['LAYOUT'])
    Colours.broken = changes.pop('broken_in', None) == int(os.environ.get('PROCESS_ID', 0))
    second = changes.pop('second', {})
    prepare(pytest.MonkeyPatch())
    if os.environ.get('PROCESS_ID') == '1':
        Colours.sizes = Colours.sizes | {'train': second.pop('examples', Colours.sizes['train'])}
        changes |= second
    with distributed.distributed(agreed=Preempted):
        loop.train(config_of(**changes), workdir)


if __name__ == '__main__':
    cli.run(main)
