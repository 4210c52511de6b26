"""Resolves the config keys that a config may leave open: number of classes, compute dtype, mean, std, interpolation.

A key is open if it has the value in `OPEN`. A resumed run uses its recorded values. A new run takes mean, std and
interpolation from the initial weights (`init_from`), or else those of DeiT. It takes the dtype from the platform and
the number of classes from the data.
"""

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step, read_metadata
from evit_jax.checkpoints.weights import AS_DEIT
from evit_jax.data import splits
from evit_jax.runtime import machine

OPEN = {'model.classes': 0, 'model.dtype': machine.AUTO, 'data.mean': [], 'data.std': [],
        'data.interpolation': ''}
NORMALISATION_KEYS = ('data.mean', 'data.std')
PREPROCESSING_KEYS = (*NORMALISATION_KEYS, 'data.eval_crop', 'data.interpolation')


def resolve_for_training(config: Mapping[str, Any], workdir: str | os.PathLike, platform: str) -> dict[str, Any]:
    """Returns the values of the open keys of a training: dtype, mean, std, base model, and recorded test split.

    A resumed run uses its recorded values, so `init_from` need not exist any more. For a new run, a warning names each
    preprocessing value that differs from that of the initial weights.

    Args:
      config: flat config of the training.
      workdir: folder of the run; with a checkpoint if the run is resumed.
      platform: 'cpu', 'gpu' or 'tpu'.

    Raises:
      ValueError: the workdir or the initial weights cannot be read.
    """
    continues = newest_step(workdir) is not None
    run = (workdirs.saved_config(workdir) or {}) if continues else None
    values = resolve(config, platform=platform, run=run)
    if not continues:
        _warn_of_other_preprocessing({**config, **values})
    base_model = config['base_model'] or (run or _config_of_weights(config['init_from'])).get('base_model', '')
    return values | {'base_model': base_model, 'data.test_split': splits.to_record(config['data.test_split'])}


def resolve(config: Mapping[str, Any], *, platform: str | None = None,
            run: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the values of the open keys mean, std and interpolation, and, if a platform is given, of dtype.

    Args:
      config: flat config.
      platform: platform that runs the model: 'cpu', 'gpu' or 'tpu'; None leaves the dtype open.
      run: flat config of the run whose values are used; None: the values are those of the weights in `init_from`.
    """
    values = {}
    given_mean, given_std = (tuple(config[key]) for key in NORMALISATION_KEYS)
    if not (given_mean and given_std and config['data.interpolation']):
        source = _config_of_weights(config['init_from']) if run is None else run
        mean, std = normalisation(source)
        values |= {'data.mean': given_mean or mean, 'data.std': given_std or std, 'data.interpolation':
                   config['data.interpolation'] or source.get('data.interpolation') or AS_DEIT['data.interpolation']}
    if platform is not None and config['model.dtype'] == machine.AUTO:
        recorded = (run or {}).get('model.dtype')
        values['model.dtype'] = machine.resolve_dtype(machine.AUTO, platform, recorded)
        reason = f'on {platform}' if recorded in (None, machine.AUTO) else 'as recorded in the workdir'
        logging.info('model.dtype=auto: %s, %s', values['model.dtype'], reason)
    return values


def fill_from_run(config: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Fills the open keys of a flat config with the values of a run's flat config."""
    return dict(config) | {key: run[key] for key, value in OPEN.items() if config.get(key) == value and key in run}


def normalisation(flat_config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the channel mean and std of a flat config. Missing or empty values are those of ImageNet."""
    mean, std = (tuple(flat_config.get(key) or AS_DEIT[key]) for key in NORMALISATION_KEYS)
    return mean, std


def _config_of_weights(init_from: str | None) -> dict[str, Any]:
    return workdirs.flat(read_metadata(init_from).get('config', {})) if init_from else {}


def _warn_of_other_preprocessing(config: Mapping[str, Any]) -> None:
    weights_config = _config_of_weights(config['init_from'])
    if not weights_config:
        return
    weights_config = AS_DEIT | weights_config
    for key in PREPROCESSING_KEYS:
        expected, value = (list(values[key]) if isinstance(values[key], list | tuple) else values[key]
                           for values in (weights_config, config))
        if expected not in ([], value):
            flag = tuple(expected) if isinstance(expected, list) else expected
            logging.warning("%s is %s here, but %s in the training of the weights in %s: give --config.%s='%s' to keep "
                            'that value', key, value, expected, config['init_from'], key, flag)
