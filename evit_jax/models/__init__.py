"""Vision transformers: configs, modules, and models as pure functions of a parameter tree."""

from evit_jax.models.model import Model, Params, create, fold_batchnorm, with_statistics
from evit_jax.models.registry import (
    CONFIGS,
    NOT_IN_SHAPES,
    config_from_flat,
    get_config,
    image_size_keys,
    image_size_of,
    list_models,
    resolve,
)

__all__ = ['CONFIGS', 'NOT_IN_SHAPES', 'Model', 'Params', 'config_from_flat', 'create', 'fold_batchnorm', 'get_config',
           'image_size_keys', 'image_size_of', 'list_models', 'resolve', 'with_statistics']
