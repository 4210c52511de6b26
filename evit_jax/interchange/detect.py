"""Which of this project's models some weights are for, from their shapes alone."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from evit_jax.models import CONFIGS
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig

_POSITIONS = ('pos_embed', 'position_embeddings')
_FEATURES = {  # features that are not computed here -> pattern of the names of their arrays
    'registers': r'(^|\.)reg(ister)?_tokens?$',
    'LayerScale': r'(^|\.)(ls\d|layer_scale\d?|gamma_\d)(\.|$)',
    'rotary position embeddings': r'rope|rotary|freqs',
    'relative position biases': r'rel(ative)?_pos',
    'a gated MLP (SwiGLU)': r'mlp\.(w12|w1|w3|weights_in|fc1_g|gate)',
    'a norm before the blocks': r'norm_pre|pre_layrnorm',
    'norms of queries and keys': r'attn\.[qk]_norm',
    'attention pooling': r'attn_pool'}


def detect(arrays: Mapping[str, Any], classes: int) -> tuple[str, ViTConfig]:
    """Name and shape of the model: image size, classes, and distillation as the weights have them.

    Args:
      arrays: by timm's names, of anything with a shape.
      classes: in case that there is no head.

    Raises:
      ValueError: they are no vision transformer's, or of none that there is here; names what they are.
    """
    others = features(arrays)
    if missing := [key for key in ('cls_token', 'pos_embed', 'blocks.0.mlp.fc1.weight', 'patch_embed.proj.weight')
                   if key not in arrays]:
        some = ', '.join(sorted(arrays)[:6])
        raise ValueError(f'these are not the weights of a vision transformer with a known layout: there is no '
                         f'{" or ".join(missing)} among {len(arrays)} arrays ({some}...){others}')
    _, positions, width = _dimensions(arrays, 'pos_embed', 3)
    hidden, _ = _dimensions(arrays, 'blocks.0.mlp.fc1.weight', 2)
    blocks = {int(match[1]) for key in arrays if (match := re.match(r'blocks\.(\d{1,4})\.', key))}
    stem = tuple(_dimensions(arrays, key, 4)[::2] for key in sorted(arrays) if re.fullmatch(
        r'patch_embed\.(stem\.\d|conv\d)\.weight', key))
    patch, in_lvvit = _dimensions(arrays, 'patch_embed.proj.weight', 4)[2], 'patch_embed.conv1.weight' in arrays
    found = (width, hidden, len(blocks), stem, patch, in_lvvit)
    name = next((name for name, config in CONFIGS.items() if found == _signature(config)), None)
    if name is None:
        patch *= 1 + in_lvvit  # whose stem halves the image
        there = '; '.join(f'{name} {config.width} wide, {config.depth} blocks, patches of {config.patch_size}'
                          for name, config in CONFIGS.items())
        raise ValueError(f'the weights are of a vision transformer {width} wide with {len(blocks)} blocks, an MLP of '
                         f'{hidden} and patches of {patch}, which is none of these: {there}{others}')
    config = CONFIGS[name]
    distilled = 'dist_token' in arrays
    grid = positions - 1 - distilled
    side = math.isqrt(max(grid, 0))
    if side < 1 or side**2 != grid:
        raise ValueError(f'pos_embed has {positions} positions, which are not those of {1 + distilled} '
                         f'token{"s" * distilled} and a square of patches{others}')
    if 'head.weight' in arrays:
        classes = _dimensions(arrays, 'head.weight', 2)[0]
    one_head = distilled and 'head.weight' in arrays and 'head_dist.weight' not in arrays
    return name, dataclasses.replace(config, image_size=side * config.patch_size, classes=classes, distilled=distilled,
                                     one_head=one_head)


def features(arrays: Mapping[str, Any]) -> str:
    """A sentence on the features that no model here has, by the names of arrays; '' where there are none."""
    found = [f'{feature} ({key})' for feature, pattern in _FEATURES.items()
             if (key := next((key for key in sorted(arrays) if re.search(pattern, key)), None))]
    if any(key.endswith(_POSITIONS) for key in arrays) and not any(key.endswith('cls_token') for key in arrays):
        found.append('no class token')
    return f'. It has {", ".join(found)}, which no model here has yet' if found else ''


def _signature(config):
    stem = tuple((convolution.channels_out, convolution.side) for convolution in config.convolutions)
    return (config.width, config.width * config.mlp_ratio, config.depth, stem, config.patch_side,
            type(config) is LVViTConfig)


def _dimensions(arrays, key, count):
    shape = arrays[key].shape
    if len(shape) != count or 0 in shape:
        raise ValueError(f'{key} has shape {shape}, wanted {count} dimensions')
    return shape
