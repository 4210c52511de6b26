"""Writes workdirs with random weights of a small model, without a training."""

import dataclasses

import jax

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.reduction.reducer import NO_MODULES
from tests.helpers import layouts


def save_random_run(folder, seed=0, modules=NO_MODULES, **changes):
    """Saves the model of `layouts` with the config of a run, and returns the folder."""
    config = layouts.config_of(**{'model__reduce_at': (1, 0), 'keep__rate': 0.75} | changes).to_dict()
    model_config = dataclasses.replace(layouts.SHAPE, classes=3)
    weights.save(folder, models.create(model_config, modules=modules).init(jax.random.key(seed)),
                 {'config': config, 'class_names': ['red', 'green', 'blue']})
    return str(folder)
