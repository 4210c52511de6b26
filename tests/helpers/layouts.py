"""A short training on any number of processes and virtual devices.

`python -m tests.helpers.layouts` runs one process of the training.
"""

import gc
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

from evit_jax import cli, models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.configs import base
from evit_jax.data import sources as data_sources
from evit_jax.data import splits
from evit_jax.metrics import writers
from evit_jax.models.config import ViTConfig
from evit_jax.runtime import distributed
from evit_jax.runtime.preemption import Preempted
from evit_jax.training import experiment, loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 10
LAYOUTS = {
    '1x1': {'processes': 1, 'devices': 1},
    '1x8': {'processes': 1, 'devices': 8},
    '1x8 fsdp': {'processes': 1, 'devices': 8, 'sharding': 'fsdp'},
    '2x4': {'processes': 2, 'devices': 4},
    '2x4 fsdp': {'processes': 2, 'devices': 4, 'sharding': 'fsdp'},
}
# Wide enough that FSDP divides its largest kernels (64 x 256) and leaves the others whole.
SHAPE = ViTConfig(image_size=16, patch_size=4, width=64, depth=2, heads=2, init_std=0.1)
# Drop path and erasing draw random numbers for each image. Mixup and cutmix draw them for each device and are off.
SETTINGS = {
    'batch_size': 64, 'epochs': 5, 'ema_decay': 0.9, 'compilation_cache': '', 'model.name': 'vit_layouts',
    'model.image_size': 16, 'model.classes': 3, 'model.dtype': 'float32', 'model.reduce_at': (1,),
    'data.augment': 'none', 'data.crop': (), 'data.eval_crop': 1.0, 'data.repeats': 1, 'data.workers': 0,
    'mixing.mixup': 0.0, 'mixing.cutmix': 0.0, 'optimizer.lr': 5e-2, 'optimizer.warmup_epochs': 1.0,
    'optimizer.clip_norm': 1.0, 'log.every': 1, 'log.eval_epochs': 2.0, 'log.pictures': 2, 'checkpoint.every': 5}


class Colours:
    """Noisy images with a bright stripe. The stripe is the object, and its colour is the class.

    The size of the test split is not a multiple of the batch size.
    """

    num_classes, class_names, image_size = 3, ('red', 'green', 'blue'), 16
    sizes = {'train': 128, 'test': 100}
    broken = False  # cannot read every fourth image

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
    """Returns the config of the training; the argument `a__b=c` sets the key `a.b`."""
    config = base.get_config()
    config.update_from_flattened_dict(SETTINGS | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


def sources(num_classes=3):
    """Returns the training and the test source. More than 3 classes have numbers as names, and no further images."""
    train_and_test = Colours('train'), Colours('test')
    if num_classes != 3:
        for source in train_and_test:
            source.num_classes, source.class_names = num_classes, tuple(map(str, range(num_classes)))
    return train_and_test


def model_of(config, base=SHAPE):
    """Returns the model config: `base` with the values of `config.model`."""
    return models.config_from_flat(workdirs.flat(config.to_dict()), base)


def setup(base=SHAPE, **changes):
    """Sets up the training in this process."""
    data = sources(changes.get('model__classes', 3))
    return experiment.setup(config_of(**changes), sources=data, model_config=base)


def train_here(workdir, base=SHAPE, *, accept_changes=False, **changes):
    """Trains to the end in this process, on its devices. Returns the final metrics."""
    config = config_of(**changes)
    return loop.train(config, workdir, accept_changes=accept_changes, sources=sources(),
                      model_config=model_of(config, base))


def evaluate_here(workdir, *, out=None, explicit=None, **changes):
    """Evaluates a run in this process. Returns the metrics."""
    return loop.evaluate_workdir(config_of(**changes), workdir, explicit=explicit, out=out, source=Colours('test'))


def prepare(patch):
    """Registers the model and the data in the tables of the package, for programs that read them by name."""
    patch.setitem(models.CONFIGS, 'vit_layouts', SHAPE)
    patch.setattr(data_sources, 'open_source', lambda name, split, **_: Colours(split))


@pytest.fixture(scope='module', autouse=True)
def least():
    """Registers the model and the data for a test file that defines `least = layouts.least`."""
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch)
        yield


def records(workdir):
    """Returns the records of the steps in metrics.jsonl."""
    return [record for record in writers.read_metrics(workdir / 'metrics.jsonl') if 'train/loss' in record]


def losses(workdir):
    """Returns the losses of the steps in metrics.jsonl."""
    return [record['train/loss'] for record in records(workdir)]


def cut_off(workdir, to, step=5):
    """Copies config and checkpoint of a workdir as they were after the save at `step`."""
    (to / 'checkpoints').mkdir(parents=True)
    shutil.copy(workdir / 'config.json', to)
    shutil.copytree(workdir / 'checkpoints' / str(step), to / 'checkpoints' / str(step))


def start(workdir, *, processes, devices, module='tests.helpers.layouts', arguments=(), **changes):
    """Starts the processes of a training. Each writes its log next to the workdir.

    Args:
      module: module that each process runs with `arguments`.
      changes: changes of the settings. `broken_in` is the index of a process that cannot read some examples. `second`
        holds settings of process 1 alone, or its number of `examples` (0: no data).
    """
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count={devices}',
        'LAYOUT': json.dumps([str(workdir), changes])}
    started = []
    for index in range(processes):
        if processes > 1:
            environment |= {'COORDINATOR_ADDRESS': f'localhost:{port}', 'NUM_PROCESSES': str(processes),
                            'PROCESS_ID': str(index)}
        with open(f'{workdir}.{index}.log', 'a') as log:
            started.append(subprocess.Popen([sys.executable, '-m', module, *arguments], cwd=ROOT,
                                            env=environment, stdout=log, stderr=log))
    return started


def wait(started, seconds=300):
    """Waits for all processes and returns their exit codes. Kills the running ones after a timeout."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(deadline - time.monotonic(), 0)) for process in started]
    finally:
        for process in started:
            process.kill()


def train(workdir, *, seconds=300, **options):
    """Trains to the end in other processes. `options` are the arguments of `start`."""
    codes = wait(start(workdir, **options), seconds)
    logs = [pathlib.Path(f'{workdir}.{index}.log').read_text()[-3000:] for index in range(len(codes))]
    assert not any(codes), '\n'.join(logs)


def until(condition, seconds):
    """Waits until a condition is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f'the condition is not true after {seconds} s'
        time.sleep(0.1)


def main():
    """Runs one process of a training, with workdir and changes from the environment variable LAYOUT."""
    workdir, changes = json.loads(os.environ['LAYOUT'])
    Colours.broken = changes.pop('broken_in', None) == int(os.environ.get('PROCESS_ID', 0))
    second = changes.pop('second', {})
    has_other_data = 'examples' in second
    if os.environ.get('PROCESS_ID') == '1':
        Colours.sizes = Colours.sizes | {'train': second.pop('examples', Colours.sizes['train'])}
        changes |= second
    gc.freeze()  # keeps the collections of a training short
    with distributed.distributed(collective_errors=Preempted):
        if has_other_data:  # `train` opens the data itself, as in a program
            prepare(pytest.MonkeyPatch())
            loop.train(config_of(**changes), workdir)
        else:
            train_here(workdir, **changes)


if __name__ == '__main__':
    cli.run(main)
