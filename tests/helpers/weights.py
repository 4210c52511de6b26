"""Random weights of small models, and workdirs of them, without a training."""

import dataclasses

import jax
import numpy as np

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.reduction.reducer import NO_MODULES
from tests.helpers import layouts


def random_params(model, seed=0):
    """Returns random parameters of a model. `Model.init` would have to be compiled, for seconds.

    No parameter is zero. Scales of norms are near 1, and variances are at least 1.
    """
    rng = np.random.default_rng(seed)

    def values(path, leaf):
        name, drawn = path[-1].key, rng.normal(size=leaf.shape, scale=0.1).astype(leaf.dtype)
        return np.asarray(abs(drawn) + 1 if name == 'var' else drawn + 1 if name == 'scale' else drawn)

    return jax.tree_util.tree_map_with_path(values, jax.eval_shape(model.init, jax.random.key(0)))


def save_random_run(folder, seed=0, modules=NO_MODULES, **changes):
    """Saves the model of `layouts` with the config of a run, and returns the folder."""
    config = layouts.config_of(**{'model__reduce_at': (1, 0), 'keep__rate': 0.75} | changes).to_dict()
    model_config = dataclasses.replace(layouts.SHAPE, classes=3)
    weights.save(folder, models.create(model_config, modules=modules).init(jax.random.key(seed)),
                 {'config': config, 'class_names': ['red', 'green', 'blue']})
    return str(folder)
