"""Model configs by name."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from evit_jax.models.config import ViTConfig
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
    'vit_digits': ViTConfig(image_size=64, patch_size=8, width=64, depth=6, heads=2, classes=10, init_std=0.2,
                            stem=(16, 32, 64, 64)),
}

# Fields that decide the logits and that no array of the weights shows. Each is a key of config.model, with 0, '' or
# False for the value of the named model.
UNSHAPED = ('heads', 'norm_epsilon', 'activation', 'pooling', 'one_head')


def get_config(name: str) -> ViTConfig:
    """Returns the config of a named model.

    Raises:
      ValueError: there is no such model; names the nearest.
    """
    return get_by_name('model', name, CONFIGS)


def list_models() -> list[str]:
    """Lists the names of all models."""
    return list(CONFIGS)


def config_from_flat(flat: Mapping[str, Any], base: ViTConfig | None = None) -> ViTConfig:
    """Returns the model's config for a flat run config; an absent key has the value of the named model.

    Args:
      base: config that replaces the one of the named model.

    Raises:
      ValueError: there is no such model, or a value is out of range.
    """
    values = {key: flat.get(f'model.{key}') for key in ('image_size', 'classes', 'distilled', *UNSHAPED)}
    base = base or get_config(flat['model.name'])
    return dataclasses.replace(base, **{key: value for key, value in values.items() if value})


def resolve(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a flat run config whose open UNSHAPED keys have the values of the named model, for comparison."""
    named = CONFIGS.get(flat.get('model.name'))
    return dict(flat) | {f'model.{key}': flat.get(f'model.{key}') or getattr(named, key)
                         for key in UNSHAPED if named is not None}
