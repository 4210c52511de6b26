"""Stores the config of a model as JSON, with the weights and in the config of the run.

Loading does not need the name of the model, so models with a custom width, depth or patch size can be loaded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig

KEY = 'model_config'
# Fields that are also keys of config.model. They are compared as config keys, because 0 and '' stand for open values.
CONFIG_FIELDS = ('image_size', 'classes', 'distilled', *models.NOT_IN_SHAPES)
_CLASSES = {cls.__name__: cls for cls in (ViTConfig, LVViTConfig)}


def to_json(config: ViTConfig) -> dict[str, Any]:
    """Returns `{'class': name, 'fields': {...}}` with all fields of the config, as JSON types."""
    fields = {name: list(value) if isinstance(value, tuple) else value
              for name, value in dataclasses.asdict(config).items()}
    return {'class': type(config).__name__, 'fields': fields}


def from_json(stored: Mapping[str, Any]) -> ViTConfig:
    """Rebuilds the config that `to_json` stored.

    Raises:
      ValueError: unknown class or field; probably another version of this package wrote it.
    """
    cls, fields = _CLASSES.get(stored['class']), stored['fields']
    known = {field.name for field in dataclasses.fields(cls)} if cls else set()
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f'the stored model config {stored["class"]} has the unknown field {unknown[0]}: another '
                         'version of evit_jax wrote it, use that version')
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def saved_in(config: Mapping[str, Any]) -> ViTConfig | None:
    """Returns the model config stored in the flat config of a run, or None."""
    return from_json(config[KEY]) if KEY in config else None


def check_has_classes(config: ViTConfig, origin: Any) -> None:
    """Raises a ValueError if a model returns features instead of logits of classes.

    Args:
      origin: path or name of the model, for the error message.
    """
    if not config.has_classes:
        raise ValueError(f'the model in {origin} returns features and has no classes: fine-tune it on labelled images '
                         f'(--config finetune --config.init_from={origin}), evaluate its features by --mode=knn, or '
                         'use evit_jax.load(...).forward(images).features')


def check_same(workdir: Any, saved: Mapping[str, Any], config: ViTConfig) -> None:
    """Checks that a model has the architecture of the run in a workdir.

    Args:
      workdir: path of the run, for the error message.
      saved: flat config of the run.

    Raises:
      ValueError: the architectures differ. The message gives the fields and both values.
    """
    if KEY not in saved:
        return
    there, here = ({'class': stored['class']} | stored['fields'] for stored in (saved[KEY], to_json(config)))
    differ = [name for name in sorted(there.keys() | here.keys())
              if there.get(name) != here.get(name) and name not in CONFIG_FIELDS]
    if differ:
        message = ', '.join(f'{KEY}.{name} {there.get(name)} -> {here.get(name)}' for name in differ)
        raise ValueError(f'workdir {workdir} holds a run of another model ({message}): give the model it was trained '
                         'with, or another --workdir')
