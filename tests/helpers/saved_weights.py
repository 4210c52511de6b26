"""Saves weights of the smallest model."""


from evit_jax.checkpoints import weights
from tests.helpers import layouts
from tests.helpers.weights import random_params


def save_weights(folder, bad=None, scale=1.0):
    """Saves weights of a model for three classes, and returns the folder.

    Args:
      bad: a value, such as NaN, for one bias of the second block.
      scale: factor of the scale of the last norm and of the head's kernel.
    """
    run = layouts.setup()
    params = random_params(run.model)
    if bad is not None:
        params['blocks'][1]['norm1']['bias'][3] = bad
    for part, name in (('norm', 'scale'), ('head', 'kernel')):
        params[part][name] *= scale
    weights.save(folder, params, run.metadata)
    return folder
