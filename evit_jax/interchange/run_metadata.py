"""Config keys of converted models: defaults, settings of training programs, and the metadata of safetensors files."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints.weights import AS_DEIT
from evit_jax.models import NOT_IN_SHAPES
from evit_jax.models.config import ViTConfig

METADATA = 'evit_jax'  # key in the metadata of a safetensors file; its value is JSON
_KEYS = ('base_model', 'model.reduce_at', 'model.fuse', 'reducer.name', 'reducer.r', 'reducer.decreasing', 'keep.rate',
         'keep.rates', 'keep.tokens', 'keep.drop', 'keep.macs', 'data.mean', 'data.std', 'data.eval_crop',
         'data.interpolation')
_CROPS = {'lvvit_t': 0.9, 'lvvit_s': 0.9, 'lvvit_m': 1.0}  # evaluation crop of the authors


def model_settings(name: str, config: ViTConfig) -> dict[str, Any]:
    """Returns the config keys that identify the model, without the prefix 'model.'."""
    keys = ('image_size', 'classes', 'distilled', *NOT_IN_SHAPES)
    return {'name': name} | {key: getattr(config, key) for key in keys}


def default_settings(name: str, config: ViTConfig) -> dict[str, Any]:
    """Returns the config keys of DeiT, or of LV-ViT's authors. They are assumed for weights without settings."""
    crop = _CROPS.get(name, AS_DEIT['data.eval_crop'])
    return AS_DEIT | {'model.reduce_at': config.default_reduce_at, 'data.eval_crop': crop}


def plan_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the arguments of EViT's or DynamicViT's training program to config keys of the token plan.

    Returns:
      The config keys; {} if the arguments belong to another program or are out of range.
    """
    if isinstance(rate := arguments.get('base_rate'), float) and 0 < rate <= 1:  # DynamicViT
        return {'keep.rate': rate}
    rate, reduce_at = arguments.get('base_keep_rate'), arguments.get('drop_loc')  # EViT
    try:
        reduce_at = tuple(ast.literal_eval(reduce_at) if isinstance(reduce_at, str) else reduce_at)
        if not (0 < rate <= 1 and all(type(block) is int for block in reduce_at)):
            raise ValueError
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return {}
    return {'model.reduce_at': reduce_at, 'model.fuse': bool(arguments.get('fuse_token')), 'keep.rate': float(rate)}


def with_config(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """Adds what `VisionModel.save_pretrained` stored in a config.json to the metadata of a safetensors file."""
    return ({METADATA: json.dumps(config[METADATA])} if METADATA in config else {}) | dict(metadata)


def from_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the config keys and class names that `to_metadata` stored; ({}, []) for a file of another program."""
    try:
        stored = json.loads(metadata.get(METADATA, '{}'))
        names = [str(name) for name in stored.get('class_names', ())]
        return {key: value for key, value in stored.get('config', {}).items() if key in _KEYS}, names
    except (ValueError, AttributeError, TypeError, RecursionError):
        logging.warning('the config in the metadata of the file cannot be read; ignored')
        return {}, []


def stored_config(metadata: Mapping[str, str]) -> ViTConfig | None:
    """Returns the model config that `to_metadata` stored; None for a file of another program."""
    try:
        stored = json.loads(metadata.get(METADATA, '{}')).get(model_configs.KEY)
        return model_configs.from_json(stored) if stored else None
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        logging.warning('the model config in the metadata of the file cannot be read; ignored')
        return None


def to_metadata(model_config: ViTConfig, config: Mapping[str, Any], timm_name: str = '') -> dict[str, str]:
    """Returns the metadata of a safetensors file: model config, config keys, class names, and timm's model name.

    Args:
      model_config: config of the model.
      config: flat config of the run, as `workdir.saved_config` returns it.
      timm_name: name of timm's model that has exactly this config, or ''.
    """
    stored = {'config': {key: config[key] for key in _KEYS if key in config},
              model_configs.KEY: model_configs.to_json(model_config), 'class_names': config.get('class_names', [])}
    return {'format': 'pt'} | ({'architecture': timm_name} if timm_name else {}) | {METADATA: json.dumps(stored)}
