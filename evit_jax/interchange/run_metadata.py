"""What is known of weights beside their values: how images are prepared, which tokens go, what the classes mean."""

import ast
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.checkpoints.weights import AS_DEIT
from evit_jax.models import CONFIGS, UNSHAPED
from evit_jax.models.config import ViTConfig

METADATA = 'evit_jax'  # the key under which all of it stands in a safetensors file
_KEYS = ('model.reduce_at', 'model.fuse', 'reducer.name', 'keep.rate', 'keep.rates', 'keep.tokens', 'data.mean',
         'data.std', 'data.eval_crop', *(f'model.{key}' for key in UNSHAPED))
_CROPS = {'lvvit_t': 0.9, 'lvvit_s': 0.9, 'lvvit_m': 1.0}  # of evaluation, by those who trained them
_SIZES = {'deit_t': 'tiny', 'deit_s': 'small', 'deit_b': 'base'}


def model_keys(name: str, config: ViTConfig) -> dict[str, Any]:
    """The part of a config that says which model it is."""
    keys = ('image_size', 'classes', 'distilled', *UNSHAPED)
    return {'name': name} | {key: getattr(config, key) for key in keys}


def assumed(name: str, config: ViTConfig) -> dict[str, Any]:
    """Config keys for weights of which nothing else is known: as with DeiT, or as its authors have it for an LV-ViT."""
    crop = _CROPS.get(name, AS_DEIT['data.eval_crop'])
    return AS_DEIT | {'model.reduce_at': config.default_reduce_at, 'data.eval_crop': crop}


def settings_of(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the arguments of EViT's or DynamicViT's training program say of the plan, as config keys; else {}."""
    if isinstance(rate := arguments.get('base_rate'), float) and 0 < rate <= 1:
        return {'keep.rate': rate}  # DynamicViT's
    rate, at = arguments.get('base_keep_rate'), arguments.get('drop_loc')
    try:
        at = tuple(ast.literal_eval(at) if isinstance(at, str) else at)
        if not (0 < rate <= 1 and all(type(block) is int for block in at)):
            raise ValueError
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return {}
    return {'model.reduce_at': at, 'model.fuse': bool(arguments.get('fuse_token')), 'keep.rate': float(rate)}


def from_metadata(metadata: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Config keys and class names of a file that `to_metadata` was written to; none of another's."""
    try:
        held = json.loads(metadata.get(METADATA, '{}'))
        names = [str(name) for name in held.get('class_names', ())]
        return {key: value for key, value in held.get('config', {}).items() if key in _KEYS}, names
    except (ValueError, AttributeError, TypeError, RecursionError):
        logging.warning('what the file says of its config cannot be read, and is left out')
        return {}, []


def to_metadata(name: str, model_config: ViTConfig, config: Mapping[str, Any]) -> dict[str, str]:
    """Text for a safetensors file: the architecture by timm's name where there is one, and what a run's config says.

    Args:
      config: of a run, flat, as `workdir.saved_config` gives it.
    """
    values = config | {f'model.{key}': getattr(model_config, key) for key in UNSHAPED}
    held = {'config': {key: values[key] for key in _KEYS if key in values},
            'class_names': config.get('class_names', [])}
    named = name in _SIZES and not _timm_arguments(name, model_config)
    architecture = {'architecture': _timm_name(name, model_config)} if named else {}
    return {'format': 'pt'} | architecture | {METADATA: json.dumps(held)}


def _timm_name(name, config):
    """Without image size and classes, which timm is told besides."""
    return f'deit_{_SIZES[name]}{"_distilled" * config.distilled}_patch16_224'


def timm_call(name: str, config: ViTConfig, path: Any) -> str:
    """The Python that makes the model in timm with the weights in a file; '' where timm has none such."""
    if name not in _SIZES or config.one_head:
        return ''
    size = f', img_size={config.image_size}' * (config.image_size != 224)
    classes = f', num_classes={config.classes}' * (config.classes != 1000)
    return (f'timm.create_model({_timm_name(name, config)!r}{size}{classes}{_timm_arguments(name, config)}, '
            f'checkpoint_path={str(path)!r})')


def _timm_arguments(name, config):
    """The arguments for values that differ from those of the name; '' where none does."""
    usual = CONFIGS[name]
    texts = {'heads': f'num_heads={config.heads}', 'activation': f'act_layer={config.activation!r}',
             'norm_epsilon': f'norm_layer=functools.partial(torch.nn.LayerNorm, eps={config.norm_epsilon:g})',
             'pooling': f"global_pool='avg', fc_norm={config.pooling == 'avg_fc_norm'}"}
    return ''.join(f', {text}' for key, text in texts.items() if getattr(config, key) != getattr(usual, key))
