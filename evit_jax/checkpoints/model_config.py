"""The config of a model as JSON, stored with its weights and in the config of its run.

A model is rebuilt from it without its name, so a model of its own width, depth and patch size can be loaded again.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig

KEY = 'model_config'
# Fields that are config keys too. They are compared there, where 0 or '' leaves a value open.
CONFIG_FIELDS = ('image_size', 'classes', 'distilled', *models.UNSHAPED)
_CLASSES = {cls.__name__: cls for cls in (ViTConfig, LVViTConfig)}


def to_json(config: ViTConfig) -> dict[str, Any]:
    """Returns `{'class': name, 'fields': {...}}` with every field of the config, in JSON's types."""
    fields = {name: list(value) if isinstance(value, tuple) else value
              for name, value in dataclasses.asdict(config).items()}
    return {'class': type(config).__name__, 'fields': fields}


def from_json(stored: Mapping[str, Any]) -> ViTConfig:
    """Rebuilds the config that `to_json` stored.

    Raises:
      ValueError: unknown class or field, as written by another version of this package.
    """
    cls, fields = _CLASSES.get(stored['class']), stored['fields']
    known = {field.name for field in dataclasses.fields(cls)} if cls else set()
    if unknown := sorted(fields.keys() - known):
        raise ValueError(f'the stored model config {stored["class"]} has the unknown field {unknown[0]}: another '
                         'version of evit_jax wrote it, use that version')
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def saved_in(config: Mapping[str, Any]) -> ViTConfig | None:
    """The model config in the saved flat config of a run, or None where it has none."""
    return from_json(config[KEY]) if KEY in config else None


def check_same(workdir: Any, saved: Mapping[str, Any], config: ViTConfig) -> None:
    """Checks that a model has the architecture of the run in a workdir.

    Args:
      workdir: named in the message.
      saved: flat config of that run.

    Raises:
      ValueError: the architectures differ; names the fields and both values.
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
