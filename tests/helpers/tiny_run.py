"""A tiny training on generated images: its config, its command, and its result."""

import pathlib
import sys

import jax
import numpy as np

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.configs import base
from evit_jax.models.config import ViTConfig
from evit_jax.training import experiment, loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 40
SETTINGS = {'batch_size': 256, 'epochs': 1, 'compilation_cache': '', 'ema_decay': 0.9, 'model.name': 'vit_digits',
            'model.image_size': 32, 'model.classes': 10, 'model.dtype': 'float32', 'model.reduce_at': (1, 2, 3),
            'model.drop_path': 0.1, 'keep.shrink_epochs': 1, 'keep.levels': 2, 'data.augment': 'jitter',
            'data.crop': (), 'data.eval_crop': 1.0, 'data.repeats': 1, 'data.workers': 0, 'optimizer.lr': 6e-3,
            'optimizer.warmup_epochs': 0.2, 'log.every': 4, 'log.eval_epochs': 2.0, 'log.pictures': 2,
            'checkpoint.every': 7}
# The model of `train`, which reduces tokens in its second block.
MODEL = ViTConfig(image_size=32, patch_size=8, width=32, depth=2, heads=2, classes=10, init_std=0.2)
# A small model for images of 32 pixels that compiles in seconds.
NARROW = ViTConfig(image_size=32, patch_size=8, width=16, depth=2, heads=2, classes=3)


def config_of(**changes):
    """Returns the config; `a__b=c` changes the key a.b."""
    config = base.get_config()
    config.update_from_flattened_dict(SETTINGS | {key.replace('__', '.'): value for key, value in changes.items()})
    return config


def config_of_model(**changes):
    """Returns the config with the block at which MODEL reduces tokens."""
    return config_of(model__reduce_at=(1,), **changes)


def train(workdir, **changes):
    """Trains the small model in this process. Returns the final metrics."""
    return loop.train(config_of_model(**changes), workdir, model_config=MODEL)


def command(workdir, *more):
    """Returns the command line that trains the named model of the config."""
    settings = [f'--config.{key}={value}' for key, value in SETTINGS.items()]
    return [sys.executable, '-m', 'evit_jax.main', '--config', 'configs/base.py', '--workdir', str(workdir), *settings,
            *more]


def final_parameters(workdir, config):
    """Returns the parameters of the newest checkpoint, and its step."""
    checkpoints = CheckpointManager(workdir, keep=3)
    state = checkpoints.restore(experiment.setup(config).abstract_state())
    checkpoints.close()
    return jax.tree.map(np.asarray, state.params), int(state.step)
