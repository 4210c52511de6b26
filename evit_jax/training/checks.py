"""Checks a flat config before any long work starts. The checks write nothing."""

import os
from collections.abc import Mapping
from typing import Any

import jax

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.manager import newest_step
from evit_jax.interchange.opening import check_exists
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.schedule import KeepSchedule, stages
from evit_jax.runtime import profiler, sharding
from evit_jax.training import distillation, inputs, limits, objective_config
from evit_jax.training.model_setup import config_and_plans


def check_start(config: Mapping[str, Any], workdir: str | os.PathLike, base: ViTConfig | None = None) -> None:
    """Checks that the teacher and the initial weights of a run exist.

    Args:
      base: model config to use instead of the named model's.

    Raises:
      ValueError: the teacher or the initial weights are missing, or the initial weights do not match the model.
    """
    distillation.check_teacher(config)
    if newest_step(workdir) is not None:
        return
    check_init_from(config)
    if not config['init_from']:
        if config['model.freeze']:
            raise ValueError(f'config.model.freeze={config["model.freeze"]} would keep random weights: give '
                             '--config.init_from of trained weights, or --config.model.freeze=')
        return
    weights.check_values(config['init_from'], models.config_from_flat(config, base))


def check_init_from(config: Mapping[str, Any]) -> None:
    """Raises a ValueError if `init_from` is required but not given, or names no folder with a checkpoint."""
    init_from = config['init_from']
    if init_from is None:
        raise ValueError('this recipe starts from trained weights: give --config.init_from=WORKDIR of a trained '
                         'run, or --config.init_from= to start from random weights')
    if init_from:
        check_exists(init_from, 'init_from')


def check_training(config: Mapping[str, Any], base: ViTConfig | None = None) -> None:
    """Checks the values of a config for training. Reads no files.

    Args:
      base: model config to use instead of the named model's.

    Raises:
      ValueError: a value is outside its limits, contradicts another value, or does not allow training.
    """
    check(config, base)
    limits.check_mixing(config, jax.device_count())


def check(config: Mapping[str, Any], base: ViTConfig | None = None) -> None:
    """Checks the values of a config for training or evaluation. Reads no files.

    Args:
      base: model config to use instead of the named model's.

    Raises:
      ValueError: a value is outside its limits or contradicts another value.
    """
    limits.check(config)
    profiler.parse_steps(config['profile_steps'])
    objective_config.check(config, base)
    inputs.train_transform(config)
    inputs.eval_transform(config)
    _check_tokens(config)
    _, plan_at, _ = config_and_plans(config, base=base)
    schedule = KeepSchedule(*(config[f'keep.{name}'] for name in ('start_epoch', 'shrink_epochs', 'levels')))
    stages(schedule, plan_at, total_steps=1)
    sharding.data_mesh(config['batch_size'])


def _check_tokens(config):
    """Raises a ValueError unless each block of model.reduce_at has one token count or one rate."""
    blocks, drop = tuple(config['model.reduce_at']), tuple(config['keep.drop'])
    if config['keep.macs'] or config['reducer.r']:
        return
    key = 'keep.tokens' if config['keep.tokens'] else 'keep.rates'
    values = tuple(config[key])
    if values and len(values) != len(blocks):
        raise ValueError(f'config.{key}={values} has {len(values)} values for the {len(blocks)} blocks of '
                         f'config.model.reduce_at={blocks}: give one value for each block, or '
                         f"--config.{key}='()' and --config.keep.rate")
    if drop and (not config['keep.tokens'] or len(drop) != len(blocks)):
        raise ValueError(f'config.keep.drop={drop} goes with config.keep.tokens={tuple(config["keep.tokens"])} at '
                         f'config.model.reduce_at={blocks}: give one value of each for each block, or '
                         "--config.keep.drop='()'")
