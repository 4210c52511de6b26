"""A training with an example that makes the loss of its batches NaN."""

import jax.numpy as jnp
import numpy as np

from evit_jax.data import order
from evit_jax.data.transforms import mixing
from tests.helpers import layouts

EXAMPLE = 3  # index of the example


def poison(monkeypatch):
    """Makes the example white, and replaces the images of each batch that contains a white image by NaN."""
    mix_batch, getitem = mixing.mix_batch, layouts.Colours.__getitem__

    def poisoned_mix_batch(images, labels, key, **kwargs):
        images, targets = mix_batch(images, labels, key, **kwargs)
        return jnp.where(images.max() > 1.9, jnp.nan, images), targets

    def poisoned_getitem(self, index):
        example = getitem(self, index)
        return example | {'image': np.full_like(example['image'], 255)} if index == EXAMPLE else example

    monkeypatch.setattr(mixing, 'mix_batch', poisoned_mix_batch)
    monkeypatch.setattr(layouts.Colours, '__getitem__', poisoned_getitem)


def settings(**changes):
    """Returns the changed settings of the training."""
    return {'mixing__erase': 0.0, 'data__colour_jitter': 0.0, 'data__mean': (0.5,) * 3,
            'data__std': (0.25,) * 3} | changes


def poisoned_steps():
    """Returns the steps whose batches contain the example."""
    return [step for step in range(layouts.STEPS) if str(EXAMPLE) in order.batch_ids(
        layouts.Colours('train'), step, batch_size=64, seed=0)]
