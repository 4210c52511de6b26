"""The preprocessing that weights were trained with, in the place of what a config leaves open."""

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step, read_metadata
from evit_jax.checkpoints.weights import AS_DEIT
from evit_jax.data import splits

KEYS = ('data.mean', 'data.std', 'data.eval_crop')
_NORMALISATION = KEYS[:2]


def normalisation(flat: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std by the dotted keys of a config; ImageNet's where they are missing or empty."""
    mean, std = (tuple(flat.get(key) or AS_DEIT[key]) for key in _NORMALISATION)
    return mean, std


def filled(config: Any, recorded: Mapping[str, Any] | None = None) -> Any:
    """The config with values for a mean or std that is empty.

    Args:
      recorded: flat config that has them; if not given, that of the weights in `config.init_from`, else ImageNet's.
    """
    if all(config.data[name] for name in ('mean', 'std')):
        return config
    known = _of_weights(config.init_from) if recorded is None else recorded
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for name, value in zip(('mean', 'std'), normalisation(known)):
            config.data[name] = tuple(config.data[name]) or value
    return config


def resolve(config: Any, workdir: str | os.PathLike) -> Any:
    """The config that a training in the workdir records and keeps: nothing of the preprocessing is left open.

    A run that continues has its own values; `init_from` need not be there any more. For a run that begins, a WARNING
    names the values that differ from those of its initial weights.
    """
    if newest_step(workdir) is not None:
        config = filled(config, workdirs.saved_config(workdir) or {})
    else:
        config = filled(config)
        _warn_of_other_values(config)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.test_split = splits.to_record(config.data.test_split)
    return config


def _of_weights(init_from):
    return workdirs.flat(read_metadata(init_from).get('config', {})) if init_from else {}


def _warn_of_other_values(config):
    known = _of_weights(config.init_from)
    if not known:
        return
    known, here = AS_DEIT | known, workdirs.flat(config.to_dict())
    for key in KEYS:
        there, value = (list(of[key]) if isinstance(of[key], list | tuple) else of[key] for of in (known, here))
        if there not in ([], value):
            flag = tuple(there) if isinstance(there, list) else there
            logging.warning("%s is %s here, and %s where the weights of %s were trained: give --config.%s='%s' to keep "
                            'theirs', key, value, there, config.init_from, key, flag)
