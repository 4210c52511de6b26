"""Finds the call of `timm.create_model` for a config, and the arrays that timm's model has."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from evit_jax.interchange.names_timm import to_eva
from evit_jax.models.config import ViTConfig, as_hw

_LARGER = {'width': 1024, 'depth': 24, 'heads': 16}
_BASE = {'width': 768, 'heads': 12}
_TINY = {'width': 192, 'heads': 3}
_DEIT3 = ViTConfig(layer_scale=1e-6, prefix_positions=0)
_DINOV2 = ViTConfig(image_size=518, patch_size=14, layer_scale=1e-5, classes=0)
_REG4 = dataclasses.replace(_DINOV2, registers=4, prefix_positions=0)
_GIANT = {'width': 1536, 'depth': 40, 'heads': 24, 'mlp_ratio': 4096 / 1536, 'swiglu': True, 'activation': 'silu'}
_CLIP = ViTConfig(norm_epsilon=1e-5, pre_norm=True, patch_bias=False, **_BASE)
_SIGLIP = ViTConfig(class_token=False, pooling='map', classes=0, **_BASE)
_EVA = {'pooling': 'avg_fc_norm', 'k_bias': False}
_EVA02 = ViTConfig(patch_size=14, mlp_ratio=512 / 192, swiglu=True, activation='silu', rope='eva', rope_grid=16,
                   classes=0, **_TINY, **_EVA)
_DINOV3 = ViTConfig(image_size=256, norm_epsilon=1e-5, layer_scale=1e-5, registers=4, absolute_positions=False,
                    qkv_bias=False, rope='dinov3', rope_base=100.0, pooling='avg', classes=0)
_SIZES = {'tiny': _TINY, 'small': {}, 'base': _BASE, 'large': _LARGER}


def _sizes(name: str, config: ViTConfig, sizes: str) -> dict[str, ViTConfig]:
    return {name.format(size): dataclasses.replace(config, **_SIZES[size]) for size in sizes.split()}


# Models of timm by name. The call of a config begins with the model that needs the fewest arguments.
MODELS: dict[str, ViTConfig] = {
    **_sizes('deit_{}_patch16_224', ViTConfig(), 'tiny small base'),
    **_sizes('vit_{}_patch16_224', ViTConfig(), 'large'),
    **_sizes('deit_{}_distilled_patch16_224', ViTConfig(distilled=True), 'tiny small base'),
    **_sizes('deit3_{}_patch16_224', _DEIT3, 'small base large'),
    **_sizes('vit_{}_patch14_dinov2', _DINOV2, 'small base large'),
    **_sizes('vit_{}_patch14_reg4_dinov2', _REG4, 'small base large'),
    'vit_giant_patch14_dinov2': dataclasses.replace(_DINOV2, **_GIANT),
    'vit_giant_patch14_reg4_dinov2': dataclasses.replace(_REG4, **_GIANT),
    'vit_base_patch16_clip_224': _CLIP, 'vit_base_patch32_clip_224': dataclasses.replace(_CLIP, patch_size=32),
    'vit_base_patch16_siglip_224': _SIGLIP,
    'vit_base_patch16_siglip_gap_224': dataclasses.replace(_SIGLIP, pooling='avg'),
    'eva02_tiny_patch14_224': _EVA02, 'eva02_small_patch14_224': dataclasses.replace(_EVA02, width=384, heads=6),
    'eva02_base_patch14_224': dataclasses.replace(_EVA02, mlp_norm=True, mlp_ratio=2048 / 768, **_BASE),
    'eva_giant_patch14_224': ViTConfig(patch_size=14, width=1408, depth=40, heads=16, mlp_ratio=6144 / 1408, **_EVA),
    **_sizes('vit_{}_patch16_dinov3', _DINOV3, 'small base large'),
    **_sizes('vit_{}_patch16_dinov3_qkvb', dataclasses.replace(_DINOV3, qkv_bias=True, k_bias=False),
             'small base large'),
    'vit_small_plus_patch16_dinov3': dataclasses.replace(_DINOV3, mlp_ratio=4.0, swiglu=True, activation='silu')}
_FREE = ('init_std', 'position_resize', 'layer_scale', 'projection', 'head_bias', 'prefix_positions', 'patch_bias')
_ACTIVATIONS = 'gelu', 'gelu_tanh', 'quick_gelu'


class TimmModel(NamedTuple):
    """A model of timm: its name, and the arguments of `timm.create_model` that differ from those of the name."""

    name: str
    arguments: dict[str, Any]  # JSON types
    arrays: dict[str, np.ndarray]

    def code(self, path: Any) -> str:
        """Returns Python code that loads a file of the arrays."""
        arguments = ''.join(f', {key}={value!r}' for key, value in self.arguments.items())
        return f'timm.create_model({self.name!r}{arguments}, checkpoint_path={str(path)!r})'


def timm_model(config: ViTConfig, arrays: Mapping[str, np.ndarray]) -> TimmModel | str:
    """Returns timm's model for a config, with the arrays of its state dict.

    Args:
      arrays: NumPy arrays by the names of `torch_weights`.

    Returns:
      The model, or the reason why timm has none.
    """
    if reason := _impossible(config):
        return reason
    wanted, is_eva = _fields(config), _is_eva(config)
    candidates = {name: model for name, model in MODELS.items() if (
        _is_eva(model) == is_eva and model.distilled == config.distilled and
        model.norm_epsilon == config.norm_epsilon and (is_eva or model.swiglu == config.swiglu))}
    if not candidates:
        return f'no model of timm has norm_epsilon={config.norm_epsilon:g}' + ', swiglu=True' * config.swiglu
    make = _eva_arguments if is_eva else _vit_arguments
    arguments = make(config)
    differing = {name: _differing(arguments, make(model)) for name, model in candidates.items()}
    name = min(differing, key=lambda name: (len(differing[name]), _fields(candidates[name]) != wanted))
    return TimmModel(name, differing[name], _arrays(config, arrays, is_eva))


def _differing(arguments, of_name):
    """Returns the arguments that differ from those of a name. The norm after pooling depends on the pooling in timm."""
    differ = {key: value for key, value in arguments.items() if value != of_name[key]}
    if bool(arguments['init_values']) == bool(of_name['init_values']):
        differ.pop('init_values', None)  # an initial value; the weights replace it
    if 'global_pool' in differ:
        differ |= {key: arguments[key] for key in ('fc_norm', 'use_fc_norm') if key in arguments}
    return differ


def _fields(config):
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in _FREE}


def _is_eva(config):
    """Returns True if only timm's class Eva computes a config."""
    return bool(config.rope) or not config.k_bias or not config.absolute_positions


def _impossible(config: ViTConfig) -> str:
    """Returns the reason why no model of timm computes a config; '' if one does."""
    is_eva = _is_eva(config)
    reasons = {
        'the blocks of an LV-ViT': type(config) is not ViTConfig, 'a stem of convolutions': bool(config.stem),
        'scaled branches': config.residual_scale != 1,
        'a distillation token without a head': config.one_head,
        'the mean of the patch tokens beside the class token': config.pooling == 'token_avg',
        f'the activation {config.activation} in an MLP without gates': not config.swiglu and (
            config.activation != 'gelu' if is_eva else config.activation not in _ACTIVATIONS),
        f'the activation {config.activation} in a gated MLP': config.swiglu and config.activation != 'silu',
        'a bias of the keys beside rotary positions': is_eva and config.qkv_bias and config.k_bias,
        'a patch projection with a bias before a norm' if config.patch_bias else 'a patch projection without a bias':
            config.patch_bias == config.pre_norm,
        'a gated MLP with a norm, without rotary positions': config.mlp_norm and not is_eva,
        'an attention pool beside rotary positions': is_eva and config.pooling == 'map',
        'no rotary and no absolute positions': not config.rope and not config.absolute_positions and is_eva}
    return next((f'timm has no model with {reason}' for reason, holds in reasons.items() if holds), '')


def global_pool(config: ViTConfig) -> str:
    """Returns timm's name of the pooling. A separate argument gives the position of the norm."""
    return 'avg' if config.pooling == 'avg_fc_norm' else config.pooling


def _shared_arguments(config):
    height, width = as_hw(config.image_size)
    return {'img_size': height if height == width else [height, width], 'patch_size': config.patch_size,
            'embed_dim': config.width, 'depth': config.depth, 'num_heads': config.heads,
            'qkv_bias': config.qkv_bias, 'qk_norm': config.qk_norm, 'init_values': config.layer_scale or None,
            'class_token': config.class_token, 'num_classes': config.classes,
            'global_pool': global_pool(config),
            'no_embed_class': config.num_prefix_positions < config.num_prefix_tokens}


def _vit_arguments(config: ViTConfig) -> dict[str, Any]:
    """Returns the arguments of timm's VisionTransformer."""
    packed = config.mlp_hidden * (1 + config.swiglu)
    return _shared_arguments(config) | {
        'mlp_ratio': _ratio(packed, config.width), 'reg_tokens': config.registers, 'pre_norm': config.pre_norm,
        'fc_norm': config.pooling == 'avg_fc_norm', 'act_layer': None if config.swiglu else config.activation}


def _eva_arguments(config: ViTConfig) -> dict[str, Any]:
    """Returns the arguments of timm's Eva."""
    split = _splits(config)
    rope = {'rope_type': 'dinov3', 'rope_rotate_half': True} if config.rope == 'dinov3' else {
        'rope_type': 'cat', 'rope_rotate_half': False}
    grid = {'ref_feat_shape': [config.rope_grid] * 2 if config.rope_grid else None}
    return _shared_arguments(config) | rope | grid | {
        'mlp_ratio': _ratio(config.mlp_hidden, config.width), 'num_reg_tokens': config.registers,
        'use_pre_transformer_norm': config.pre_norm, 'use_fc_norm': config.pooling == 'avg_fc_norm',
        'swiglu_mlp': config.swiglu, 'scale_mlp': config.mlp_norm, 'qkv_fused': not split['split_qkv'],
        'swiglu_align_to': (8 if config.mlp_hidden % 8 == 0 else 1) * (split['split_mlp'] and not config.mlp_norm),
        'use_abs_pos_emb': config.absolute_positions, 'use_rot_pos_emb': bool(config.rope),
        'rope_temperature': config.rope_base}


def _splits(config):
    """Returns which arrays timm's Eva divides, as arguments of `to_eva`."""
    return {'split_qkv': config.mlp_norm and config.qkv_bias,
            'split_mlp': config.swiglu and (config.mlp_norm or config.rope == 'dinov3')}


def _ratio(hidden, width):
    """Returns the ratio with which timm's int(width * ratio) is `hidden`."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _arrays(config, arrays, is_eva):
    """Returns the arrays of timm's model."""
    arrays = dict(arrays)
    if not config.head_bias and config.classes:
        arrays['head.bias'] = np.zeros(config.classes, np.float32)
    if 0 < config.num_prefix_positions < config.num_prefix_tokens:  # timm has positions for all prefix tokens or none
        positions, arrays['pos_embed'] = np.split(arrays['pos_embed'], [config.num_prefix_positions], axis=1)
        arrays['cls_token'] = arrays['cls_token'] + positions[:, :1]
    return to_eva(arrays, **_splits(config)) if is_eva else arrays
