"""The smallest model and data of the tests, created with the public API."""

import numpy as np

import evit_jax
from evit_jax.inference.model import VisionModel

NAMES = ('red', 'green', 'blue')
CONFIG = evit_jax.ViTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, classes=3, init_std=0.2)


def model(config=CONFIG, **options):
    """Returns a model with random weights that reduces in the second block and does not crop images."""
    created = evit_jax.create_model(config, **{'keep_rate': 0.5, 'reduce_at': (1,), 'class_names': NAMES} | options)
    return VisionModel(created.loaded._replace(eval_crop=None), batch_size=created.batch_size)


def images(count=4, size=16, seed=0):
    """Returns random images, uint8 [count, size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def stripes(count=96):
    """Returns images (uint8) and labels (int). Each image has a bright stripe in the channel given by its label."""
    pixels, labels = images(count) // 2, np.arange(count) % 3
    for image, label in zip(pixels, labels):
        image[4:12, :, label] = 255
    return pixels, labels
