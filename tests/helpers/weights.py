"""Folders of weights of a small random model, in place of a training."""

import dataclasses

import jax

from evit_jax import models
from evit_jax.checkpoints import weights
from tests.helpers import layouts


def save_random_run(folder, seed=0, predictors=0, **changes):
    """Saves the model of `layouts` with the config of a run, and returns the folder."""
    config = layouts.config_of(**{'model__reduce_at': (1, 0), 'keep__rate': 0.75} | changes).to_dict()
    model_config = dataclasses.replace(layouts.SHAPE, classes=3, predictors=predictors)
    weights.save(folder, models.create(model_config).init(jax.random.key(seed)),
                 {'config': config, 'class_names': ['red', 'green', 'blue']})
    return str(folder)
