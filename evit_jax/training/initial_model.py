"""Resolves the config keys that take the model and its preprocessing from the initial weights.

With `model.name='init_from'`, a run has the architecture of the weights in `init_from`, or, if it resumes, of its
checkpoint.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from evit_jax import models
from evit_jax.checkpoints import loaded, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step, read_metadata
from evit_jax.models.config import ViTConfig
from evit_jax.training import checks, model_setup

QUARTERS, OF_WEIGHTS = (-1,), -1  # values of model.reduce_at and data.eval_crop that are resolved here


def resolve(config: Mapping[str, Any], workdir: str | os.PathLike,
            model_config: ViTConfig | None = None) -> tuple[dict[str, Any], ViTConfig | None]:
    """Returns the config values of a training that its initial weights determine, and its model config.

    Args:
      config: flat config of the training.
      workdir: folder of the run; with a checkpoint if the run resumes.
      model_config: model config that is passed as an object; it replaces the named model's.

    Returns:
      The values of model.name, image size, `model.reduce_at` and `data.eval_crop` that are open, by dotted key; and the
      model config, or None for a named model.

    Raises:
      ValueError: there are no initial weights to take a value from.
    """
    from_weights = model_config is None and config['model.name'] == model_setup.INIT_FROM
    if not config['model.image_size'] and not from_weights:
        raise ValueError('config.model.image_size=0 takes the size of init_from: give --config.model.name=init_from, '
                         'or a size')
    values, open_crop = {}, config['data.eval_crop'] == OF_WEIGHTS
    settings = _settings_of_weights(config, workdir) if from_weights or open_crop else {}
    if from_weights:
        model_config = _model_of(settings, config)
        values = model_setup.values_of_model(model_config, settings.get('model.name', model_setup.CUSTOM))
        values['model.classes'] = config['model.classes']
    if open_crop:
        values['data.eval_crop'] = settings['data.eval_crop']
    if tuple(config['model.reduce_at']) == QUARTERS:
        values['model.reduce_at'] = (model_config or models.get_config(config['model.name'])).default_reduce_at
    return values, model_config


def _settings_of_weights(config, workdir):
    """Returns the flat config of the run in the workdir or, for a new run, of the initial weights."""
    if newest_step(workdir) is not None:
        return weights.completed(workdirs.saved_config(workdir) or {})
    checks.check_init_from(config)
    init_from = config['init_from']
    if not init_from:
        if config['model.name'] == model_setup.INIT_FROM:
            raise ValueError('config.model.name=init_from takes the model of config.init_from, which is empty: give '
                             '--config.init_from=WORKDIR of trained weights')
        return weights.completed({})
    metadata = read_metadata(init_from)
    return weights.completed(workdirs.flat(metadata.get('config', {})) | {
        key: metadata[key] for key in workdirs.RECORDED if key in metadata})


def _model_of(settings, config):
    """Returns the model config of the initial weights, with the image size and the classes of the config, if given."""
    model_config = loaded.config_of(config['init_from'], settings, settings)
    size = models.image_size_of(config) or models.image_size_of(settings) or model_config.image_size
    return dataclasses.replace(
        model_config, image_size=size, classes=config['model.classes'] or model_config.classes, projection=False,
        head_bias=model_config.head_bias or model_config.projection)
