"""A few labelled images with masks, and random weights that predict several classes for them."""

import dataclasses

import jax
import numpy as np
import pytest

from evit_jax import cli, models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import load_model
from evit_jax.data import sources
from evit_jax.inference import dropping
from evit_jax.reduction.plan import make_plan
from tests.helpers import layouts

SIZE = 40  # images in the test split


class Few(layouts.Colours):
    """Images of `layouts.Colours`, in small splits."""
    sizes = {'train': 8, 'test': SIZE}


def save(folder, **config):
    """Saves random weights that predict different classes for the images. Returns the folder."""
    config = layouts.config_of(keep__rate=0.5, model__reduce_at=(0, 1), **config).to_dict()
    model, rng = models.create(dataclasses.replace(layouts.SHAPE, classes=3)), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
                          jax.eval_shape(model.init, jax.random.key(0)))
    images = np.array([Few('test')[index]['image'] for index in range(8)]) / np.float32(100)
    logits, _ = jax.jit(model.apply, static_argnums=2)(params, images, make_plan(16, 2, reduce_at=()))
    params['head']['bias'] -= np.asarray(logits.mean(0))
    weights.save(folder, params, {'config': config, 'class_names': layouts.Colours.class_names})
    return folder


def drop(loaded, source=None, **options):
    """Runs the dropping experiment on the test split."""
    return dropping.drop_patches(loaded, source or Few('test'), **{
        'shares': (0, 0.25, 0.5, 0.75), 'batch_size': 16} | options)


@pytest.fixture(scope='module', autouse=True)
def small_run():
    """Registers the model `vit_layouts`, and opens `Few` as every source."""
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setattr(sources, 'open_source', lambda name, split, **_: Few(split))
        patch.setattr(cli, 'configure_logging', lambda: None)
        yield


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """The folder of the saved weights."""
    return save(tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def loaded(checkpoint):
    """The saved weights."""
    return load_model(checkpoint)
