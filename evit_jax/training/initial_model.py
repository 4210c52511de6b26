"""Resolves the config keys that take the model and its preprocessing from the initial weights.

With `model.name='init_from'`, a run has the architecture of the weights in `init_from`, or, if it resumes, of its
checkpoint.
"""

import dataclasses
import os
from typing import Any

from evit_jax import models
from evit_jax.checkpoints import loaded, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step, read_metadata
from evit_jax.models.config import ViTConfig
from evit_jax.training import checks, inputs, model_setup

QUARTERS, OF_WEIGHTS = (-1,), -1  # values of model.reduce_at and data.eval_crop that are resolved here


def resolve(config: Any, workdir: str | os.PathLike,
            model_config: ViTConfig | None = None) -> tuple[Any, ViTConfig | None]:
    """Returns the config of a training and its model config, with the values of the initial weights.

    Args:
      config: the config of the training.
      workdir: folder of the run; with a checkpoint if the run resumes.
      model_config: model config that is passed as an object; it replaces the named model's.

    Returns:
      The config with resolved model name, image size, `model.reduce_at` and `data.eval_crop`; and the model config, or
      None for a named model.

    Raises:
      ValueError: there are no initial weights to take a value from.
    """
    from_weights = model_config is None and config.model.name == model_setup.INIT_FROM
    if not config.model.image_size and not from_weights:
        raise ValueError('config.model.image_size=0 takes the size of init_from: give --config.model.name=init_from, '
                         'or a size')
    settings = _settings_of_weights(config, workdir) if from_weights or config.data.eval_crop == OF_WEIGHTS else {}
    if from_weights:
        config, model_config = _with_model(config, settings, loaded.config_of(config.init_from, settings, settings))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if config.data.eval_crop == OF_WEIGHTS:
            config.data.eval_crop = settings['data.eval_crop']
        if tuple(config.model.reduce_at) == QUARTERS:
            config.model.reduce_at = (model_config or models.get_config(config.model.name)).default_reduce_at
    return config, model_config


def _settings_of_weights(config, workdir):
    """Returns the flat config of the run in the workdir or, for a new run, of the initial weights."""
    if newest_step(workdir) is not None:
        return weights.completed(workdirs.saved_config(workdir) or {})
    checks.check_init_from(config)
    if not config.init_from:
        if config.model.name == model_setup.INIT_FROM:
            raise ValueError('config.model.name=init_from takes the model of config.init_from, which is empty: give '
                             '--config.init_from=WORKDIR of trained weights')
        return weights.completed({})
    metadata = read_metadata(config.init_from)
    return weights.completed(workdirs.flat(metadata.get('config', {})) | {
        key: metadata[key] for key in workdirs.RECORDED if key in metadata})


def _with_model(config, settings, model_config):
    """Returns config and model config for the model of the initial weights. The config decides the classes."""
    classes = config.model.classes
    size = inputs.image_size(config) or models.image_size_of(settings) or model_config.image_size
    model_config = dataclasses.replace(
        model_config, image_size=size, classes=classes or model_config.classes, projection=False,
        head_bias=model_config.head_bias or model_config.projection)
    config = model_setup.apply_model_config(config, model_config)
    with config.unlocked():
        config.model.update(name=settings.get('model.name', model_setup.CUSTOM), classes=classes)
    return config, model_config
