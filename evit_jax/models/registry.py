"""Registry of model configs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evit_jax.models.config import ImageSize, ViTConfig, as_hw, as_size
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.runtime.names import get_by_name

CONFIGS = {
    'deit_t': ViTConfig(width=192, heads=3),
    'deit_s': ViTConfig(width=384, heads=6),
    'deit_b': ViTConfig(width=768, heads=12),
    'lvvit_t': LVViTConfig(width=240, depth=12, heads=4, residual_scale=1.0),
    'lvvit_s': LVViTConfig(width=384, depth=16, heads=6),
    'lvvit_m': LVViTConfig(width=512, depth=20, heads=8),
    'lvvit_digits': LVViTConfig(image_size=64, patch_size=8, width=64, depth=6, heads=2, classes=10, init_std=0.2,
                                stem_width=16),
    'vit_digit_pairs': ViTConfig(image_size=48, patch_size=8, width=64, depth=6, heads=4, classes=10, init_std=0.1),
    'vit_digits': ViTConfig(image_size=64, patch_size=8, width=64, depth=6, heads=2, classes=10, init_std=0.2,
                            stem=(16, 32, 64, 64)),
}

# Fields that affect the logits but not the shapes of the weights. Each is a key of config.model; 0, '' and False stand
# for the value of the named model.
NOT_IN_SHAPES = ('heads', 'norm_epsilon', 'activation', 'pooling', 'one_head')


def get_config(name: str) -> ViTConfig:
    """Returns the config of a named model.

    Raises:
      ValueError: there is no such model; the message gives the nearest name.
    """
    return get_by_name('model', name, CONFIGS)


def list_models() -> list[str]:
    """Lists the names of all models."""
    return list(CONFIGS)


def config_from_flat(flat: Mapping[str, Any], base: ViTConfig | None = None) -> ViTConfig:
    """Returns the model config for a flat run config. An absent key has the value of the named model.

    Args:
      base: model config to use instead of the named model's.

    Raises:
      ValueError: there is no such model, or a value is out of range.
    """
    values = {key: flat.get(f'model.{key}') for key in ('classes', 'distilled', *NOT_IN_SHAPES)}
    values['image_size'] = image_size_of(flat)
    base = base or get_config(flat['model.name'])
    return dataclasses.replace(base, **{key: value for key, value in values.items() if value})


def image_size_of(flat: Mapping[str, Any]) -> ImageSize | None:
    """Returns the image size in a flat config of a run or of weights; None if there is none.

    `model.image_size` and `model.image_width` are height and width. In the config of converted weights,
    `model.image_size` may be a pair.
    """
    size = flat.get('model.image_size')
    if isinstance(size, int | None):
        return as_size((size, flat.get('model.image_width') or size)) if size else None
    return as_size(size)


def image_size_keys(image_size: ImageSize) -> dict[str, int]:
    """Returns the keys of `config.model` for an image size: image_size and image_width."""
    height, width = as_hw(image_size)
    return {'image_size': height, 'image_width': 0 if width == height else width}


def resolve(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flat run config in which open NOT_IN_SHAPES keys have the values of the named model."""
    named = CONFIGS.get(flat.get('model.name'))
    return dict(flat) | {f'model.{key}': flat.get(f'model.{key}') or getattr(named, key)
                         for key in NOT_IN_SHAPES if named is not None}
