"""Determines the config of a model by the names and shapes of its arrays."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from evit_jax.checkpoints.loaded import CUSTOM
from evit_jax.interchange import refusals, timm_models
from evit_jax.models import CONFIGS, NOT_IN_SHAPES
from evit_jax.models.config import ImageSize, ViTConfig, as_hw
from evit_jax.models.lvvit import LVViTConfig

LAYER_SCALE = 1e-5  # initial value in a config; a file contains only the trained values
_MAX_DEPTH = 256
_BLOCK = re.compile(r'blocks\.(\d{1,6})\.')
_STEM = re.compile(r'patch_embed\.(?:stem\.\d|conv\d)\.weight')
# Fields that do not distinguish a named model: values that no shape shows, sizes, and values that only training uses.
_ANY_VALUE = ('image_size', 'classes', 'distilled', 'init_std', 'position_resize', *NOT_IN_SHAPES)


def detect(arrays: Mapping[str, Any], default_classes: int = 0, *, is_projection: bool = False,
           image_size: ImageSize | None = None) -> tuple[str, ViTConfig]:
    """Returns the name and config of the model whose arrays have these names and shapes.

    Fields that shapes do not determine have the value of the named model, or a usual value.

    Args:
      arrays: timm's name -> object with a shape.
      default_classes: number of classes if the arrays include no head.
      is_projection: the head makes an embedding (CLIP).
      image_size: size of the images that the model was made for, if a config gives it. It determines the grid of
        position embeddings if their number fits; otherwise they form a square.

    Raises:
      ValueError: the arrays are not those of a supported vision transformer. The message says what they are.
    """
    refusals.check_arrays(arrays)
    if missing := [key for key in ('patch_embed.proj.weight', 'blocks.0.mlp.fc1.weight', 'blocks.0.mlp.fc2.weight')
                   if key not in arrays]:
        some = ', '.join(sorted(arrays)[:6])
        raise ValueError(f'these are not the weights of a vision transformer with a known layout: there is no '
                         f'{" or ".join(missing)} among {len(arrays)} arrays ({some}...)')
    stem = tuple(_dimensions(arrays, key, 4)[::2] for key in sorted(arrays) if _STEM.fullmatch(key))
    config = _with_stem(arrays, stem) if stem else _of_shapes(arrays)
    named = CONFIGS.get(name_of(config))
    if named is not None:
        config = dataclasses.replace(config, **{key: getattr(named, key) for key in (
            'init_std', 'heads', 'norm_epsilon', 'activation', 'position_resize')})
    head = arrays.get('head.weight')
    config = dataclasses.replace(
        config, classes=default_classes if head is None else _dimensions(arrays, 'head.weight', 2)[0],
        one_head=config.distilled and head is not None and 'head_dist.weight' not in arrays,
        head_bias=not is_projection or 'head.bias' in arrays, projection=is_projection and head is not None)
    config = dataclasses.replace(config, **_positions(arrays, config, image_size))
    return name_of(config), config


def name_of(config: ViTConfig) -> str:
    """Returns the key of `models.CONFIGS` for a config, or 'custom'.

    The image size, the classes and the fields that no shape shows may have other values than the named model.
    """
    fields = [field.name for field in dataclasses.fields(config) if field.name not in _ANY_VALUE]
    return next((name for name, named in CONFIGS.items() if type(named) is type(config)
                 and all(getattr(named, field) == getattr(config, field) for field in fields)), CUSTOM)


def _of_shapes(arrays) -> ViTConfig:
    """Returns the config of a ViT, without the head and the positions."""
    width, channels, height, patch = _dimensions(arrays, 'patch_embed.proj.weight', 4)
    if height != patch or channels != 3:
        raise ValueError(f'patch_embed.proj.weight has shape {arrays["patch_embed.proj.weight"].shape}: wanted square '
                         'patches of images with 3 channels')
    hidden = _dimensions(arrays, 'blocks.0.mlp.fc2.weight', 2)[1]
    packed = _dimensions(arrays, 'blocks.0.mlp.fc1.weight', 2)[0]
    swiglu = packed == 2 * hidden
    pooling = ('map' if 'attn_pool.latent' in arrays else
               'avg_fc_norm' if 'fc_norm.weight' in arrays and 'norm.weight' not in arrays else
               'token' if 'cls_token' in arrays else 'avg')
    if 'head.weight' in arrays and _dimensions(arrays, 'head.weight', 2)[1] == 2 * width:
        pooling = 'token_avg'
    return ViTConfig(
        image_size=patch, patch_size=patch, width=width, depth=_depth(arrays), heads=timm_models.default_heads(width),
        mlp_ratio=hidden / width, class_token='cls_token' in arrays, distilled='dist_token' in arrays,
        registers=_dimensions(arrays, 'reg_token', 3)[1] if 'reg_token' in arrays else 0,
        absolute_positions='pos_embed' in arrays, pooling=pooling, swiglu=swiglu,
        activation='silu' if swiglu else 'gelu', mlp_norm='blocks.0.mlp.norm.weight' in arrays,
        layer_scale=LAYER_SCALE if 'blocks.0.ls1.gamma' in arrays else 0.0,
        qk_norm='blocks.0.attn.q_norm.weight' in arrays, pre_norm='norm_pre.weight' in arrays,
        qkv_bias='blocks.0.attn.qkv.bias' in arrays or 'blocks.0.attn.q_bias' in arrays,
        k_bias='blocks.0.attn.q_bias' not in arrays,
        patch_bias='patch_embed.proj.bias' in arrays or 'norm_pre.weight' not in arrays)  # only CLIP has none


def _with_stem(arrays, stem) -> ViTConfig:
    """Returns the config of the named model with these shapes and this stem.

    The stride of a stem and the scale of an LV-ViT's branches are known only by name.

    Args:
      stem: (channels, side) of each convolution.
    """
    width, _, _, patch = _dimensions(arrays, 'patch_embed.proj.weight', 4)
    hidden, _ = _dimensions(arrays, 'blocks.0.mlp.fc1.weight', 2)
    signature = (width, hidden, _depth(arrays), stem, patch, 'patch_embed.conv1.weight' in arrays)
    named = [config for config in CONFIGS.values() if config.convolutions]
    if config := next((config for config in named if signature == (
            config.width, config.mlp_hidden, config.depth,
            tuple((part.channels_out, part.side) for part in config.convolutions), config.patch_side,
            type(config) is LVViTConfig)), None):
        return dataclasses.replace(config, distilled='dist_token' in arrays)
    supported = '; '.join(f'{config.width} wide, {config.depth} blocks, patches of {config.patch_size}'
                          for config in named)
    raise ValueError(f'the weights are of a model with {len(stem)} convolutions before the patches, {width} wide with '
                     f'{signature[2]} blocks, an MLP of {hidden} and patches of {2 * patch}, which is none of these: '
                     f'{supported}')


def _depth(arrays):
    blocks = {int(match[1]) for key in arrays if (match := _BLOCK.match(key))}
    if len(blocks) > _MAX_DEPTH or blocks != {*range(len(blocks))}:
        absent = next(block for block in range(len(blocks) + 1) if block not in blocks)
        raise ValueError(f'its {len(blocks)} blocks are numbered up to {max(blocks)}, and block {absent} is missing'
                         if len(blocks) <= _MAX_DEPTH else
                         f'it has {len(blocks)} blocks; at most {_MAX_DEPTH} are supported')
    return len(blocks)


def _positions(arrays, config, image_size):
    """Returns the fields image_size and prefix_positions."""
    patch = config.patch_size
    grid = image_size and tuple(side // patch for side in as_hw(image_size))
    if not config.absolute_positions:
        rows, columns = grid if grid and min(grid) else (max(224 // patch, 1),) * 2
        return {'image_size': (rows * patch, columns * patch)}
    positions, tokens = _dimensions(arrays, 'pos_embed', 3)[1], config.num_prefix_tokens
    for prefix in dict.fromkeys((tokens, 0, min(tokens, 1))):
        patches = positions - prefix
        side = math.isqrt(max(patches, 0))
        for rows, columns in ([grid] if grid else []) + [(side, side)]:
            if rows * columns == patches > 0:
                return {'image_size': (rows * patch, columns * patch),
                        'prefix_positions': None if prefix == tokens else prefix}
    other = f' or {grid[0]} x {grid[1]} patches' if grid else ''
    raise ValueError(f'pos_embed has {positions} positions, which are not those of {tokens} '
                     f'token{"s" * (tokens != 1)} and a square of patches{other}: for a rectangle, give '
                     '--image_size=HEIGHTxWIDTH of the images that the positions were made for')


def _dimensions(arrays, key, count):
    shape = arrays[key].shape
    if len(shape) != count or 0 in shape:
        raise ValueError(f'{key} has shape {shape}, wanted {count} dimensions')
    return shape
