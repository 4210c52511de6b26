"""Detects the model that arrays belong to by their names and shapes."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from evit_jax.models import CONFIGS
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig

_POSITIONS = ('pos_embed', 'position_embeddings')
_UNSUPPORTED = {  # feature -> pattern of its array names
    'registers': r'(^|\.)reg(ister)?_tokens?$',
    'LayerScale': r'(^|\.)(ls\d|layer_scale\d?|gamma_\d)(\.|$)',
    'rotary position embeddings': r'rope|rotary|freqs',
    'relative position biases': r'rel(ative)?_pos',
    'a gated MLP (SwiGLU)': r'mlp\.(w12|w1|w3|weights_in|fc1_g|gate)',
    'a norm before the blocks': r'norm_pre|pre_layrnorm',
    'norms of queries and keys': r'attn\.[qk]_norm',
    'attention pooling': r'attn_pool'}


def detect(arrays: Mapping[str, Any], default_classes: int) -> tuple[str, ViTConfig]:
    """Returns the name and config of the model whose arrays have these shapes.

    The arrays determine the image size, the number of classes and the distillation token.

    Args:
      arrays: timm's name -> object with a shape.
      default_classes: number of classes if the arrays include no head.

    Raises:
      ValueError: the arrays do not belong to a supported vision transformer.
    """
    unsupported = unsupported_features(arrays)
    if missing := [key for key in ('cls_token', 'pos_embed', 'blocks.0.mlp.fc1.weight', 'patch_embed.proj.weight')
                   if key not in arrays]:
        some = ', '.join(sorted(arrays)[:6])
        raise ValueError(f'these are not the weights of a vision transformer with a known layout: there is no '
                         f'{" or ".join(missing)} among {len(arrays)} arrays ({some}...){unsupported}')
    name = _matching_model(arrays, unsupported)
    config, distilled = CONFIGS[name], 'dist_token' in arrays
    positions = _dimensions(arrays, 'pos_embed', 3)[1]
    num_patches = positions - 1 - distilled
    side = math.isqrt(max(num_patches, 0))
    if side < 1 or side**2 != num_patches:
        raise ValueError(f'pos_embed has {positions} positions, which are not those of {1 + distilled} '
                         f'token{"s" * distilled} and a square of patches{unsupported}')
    has_head = 'head.weight' in arrays
    classes = _dimensions(arrays, 'head.weight', 2)[0] if has_head else default_classes
    return name, dataclasses.replace(
        config, image_size=side * config.patch_size, classes=classes, distilled=distilled,
        one_head=distilled and has_head and 'head_dist.weight' not in arrays)


def _matching_model(arrays, unsupported):
    """Returns the name of the model whose width, MLP, depth and patch embedding match the arrays."""
    width = _dimensions(arrays, 'pos_embed', 3)[2]
    hidden, _ = _dimensions(arrays, 'blocks.0.mlp.fc1.weight', 2)
    blocks = {int(match[1]) for key in arrays if (match := re.match(r'blocks\.(\d{1,4})\.', key))}
    stem = tuple(_dimensions(arrays, key, 4)[::2] for key in sorted(arrays) if re.fullmatch(
        r'patch_embed\.(stem\.\d|conv\d)\.weight', key))
    patch, is_lvvit = _dimensions(arrays, 'patch_embed.proj.weight', 4)[2], 'patch_embed.conv1.weight' in arrays
    signature = (width, hidden, len(blocks), stem, patch, is_lvvit)
    if name := next((name for name, config in CONFIGS.items() if signature == _signature(config)), ''):
        return name
    patch *= 1 + is_lvvit  # the stem of an LV-ViT halves the image
    supported = '; '.join(f'{name} {config.width} wide, {config.depth} blocks, patches of {config.patch_size}'
                          for name, config in CONFIGS.items())
    raise ValueError(f'the weights are of a vision transformer {width} wide with {len(blocks)} blocks, an MLP of '
                     f'{hidden} and patches of {patch}, which is none of these: {supported}{unsupported}')


def unsupported_features(arrays: Mapping[str, Any]) -> str:
    """Returns a sentence that lists unsupported features, detected by array names; '' if there are none."""
    features = [f'{feature} ({key})' for feature, pattern in _UNSUPPORTED.items()
             if (key := next((key for key in sorted(arrays) if re.search(pattern, key)), None))]
    if any(key.endswith(_POSITIONS) for key in arrays) and not any(key.endswith('cls_token') for key in arrays):
        features.append('no class token')
    return f'. It has {", ".join(features)}, which no model here supports' if features else ''


def _signature(config):
    stem = tuple((convolution.channels_out, convolution.side) for convolution in config.convolutions)
    return (config.width, config.width * config.mlp_ratio, config.depth, stem, config.patch_side,
            type(config) is LVViTConfig)


def _dimensions(arrays, key, count):
    shape = arrays[key].shape
    if len(shape) != count or 0 in shape:
        raise ValueError(f'{key} has shape {shape}, wanted {count} dimensions')
    return shape
