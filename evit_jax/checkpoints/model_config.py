"""The ViTConfig of a model as JSON, kept with the weights so that a model without a registered name loads again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evit_jax import models
from evit_jax.models.config import ViTConfig

KEY = 'model_config'  # key in the metadata of a checkpoint
CUSTOM = 'custom'     # model name of a config that is not in `models.SHAPES`


def to_metadata(config: ViTConfig) -> dict[str, Any]:
    """The class and the fields of a config, in the types of JSON."""
    fields = {name: list(value) if isinstance(value, tuple) else value
              for name, value in dataclasses.asdict(config).items()}
    return {'class': type(config).__name__, 'fields': fields}


def from_metadata(metadata: Mapping[str, Any]) -> ViTConfig:
    """The config that `to_metadata` wrote.

    Raises:
      ValueError: an unknown class or field, or a value out of range.
    """
    classes = {config.__name__: config for config in models.MODULES}
    if metadata['class'] not in classes:
        raise ValueError(f'the model has a config of class {metadata["class"]}, this version of evit_jax has '
                         f'{" and ".join(classes)}: load it with the version that wrote it')
    config_class = classes[metadata['class']]
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := sorted(metadata['fields'].keys() - known):
        raise ValueError(f'the {metadata["class"]} of the model has the fields {", ".join(unknown)}, which this version '
                         'of evit_jax lacks: load it with the version that wrote it')
    return config_class(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in metadata['fields'].items()})
