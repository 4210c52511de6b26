"""Converts a PyTorch state dict in the layout of timm or LV-ViT to the parameters of a model, and back.

The conversion is exact, with one exception: `num_batches_tracked` of BatchNorm is written as 0. PyTorch uses it only if
`momentum` is None.
"""

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax.models import Params, create
from evit_jax.models.config import ImageSize, ViTConfig, size_text
from evit_jax.models.positions import resize_positions
from evit_jax.reduction.reducer import NO_MODULES, PARAMS, Modules, modules_of
from evit_jax.reduction.registry import get_reducer, list_reducers

_NAMES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
_MAX_NAMED = 20  # arrays that a message lists
_VARIANCE, _COUNTER = '.running_var', '.num_batches_tracked'  # suffixes of BatchNorm arrays

_BACKBONE = re.compile(
    r'^((vit|deit|dinov2\w*|vision_model)\.)?(blocks|layers?|encoder|embeddings|patch_embed|pos_embed|cls_token|'
    r'dist_token|reg_token|norm|fc_norm|norm_pre|layernorm|pre_logits|score_predictor|rope|rel_pos_bias|attn_pool)(\.|$)|'
    r'(^|\.)(gamma\w*|ls\d|layer_scale\w*)(\.|$)')


def from_torch(weights: Mapping[str, Any], config: ViTConfig, *, allow_missing: Sequence[str] = (),
               allow_extra: Sequence[str] = ()) -> Params:
    """Converts a state dict to parameters in float32.

    Args:
      weights: timm's name -> array. Linear weights are [out, in]; convolutions are [out, in, height, width].
      config: config of the model.
      allow_missing: patterns of array names, such as 'head.*'. Matching arrays of a head may be missing; they get
        initial values.
      allow_extra: patterns of array names. Matching arrays are skipped if the model has no array of that name.

    Raises:
      ValueError: other arrays are missing, unknown or of another shape. The message lists them.
    """
    modules = learned_modules(weights)
    leaves = {_torch_key(path, modules): (path, leaf.shape)
              for path, leaf in _flattened(template(config, modules))}
    weights = {key: value for key, value in weights.items() if not key.endswith(_COUNTER)}
    _check_fit(weights, leaves, config, allow_missing, allow_extra)
    missing, extra = leaves.keys() - weights.keys(), weights.keys() - leaves.keys()
    initial = {}
    if missing:
        initial = _initial(config, modules, missing)
        logging.warning('initialised at random, as they are missing: %s. Predictions of this model mean nothing until '
                        'it is trained', ', '.join(sorted(missing)))
    if extra:
        logging.warning('left out, as the model has no such arrays: %s. If the other program computes its logits with '
                        'them, these logits differ', ', '.join(sorted(extra)))
    params: Params = {}
    for key, (path, shape) in leaves.items():
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        # A float64 outside the range of float32 becomes infinity; the caller refuses such weights.
        with np.errstate(over='ignore'):
            value = np.asarray(initial[key] if key in missing else weights[key]).astype(np.float32, copy=False)
        node[path[-1]] = _to_flax(path, value, shape)
    return params


def _initial(config, modules, keys):
    """Returns initial arrays of a model by their keys. XLA computes no others."""
    init = create(config, modules=modules).init

    def selected(key):
        return {path: leaf for path, leaf in _flattened(init(key)) if _torch_key(path, modules) in keys}

    return {_torch_key(path, modules): _from_flax(path, np.asarray(leaf), config)
            for path, leaf in jax.jit(selected)(jax.random.key(0)).items()}


def _check_fit(weights, leaves, config, allow_missing, allow_extra):
    """Raises a ValueError if arrays do not fit the model. The message lists them."""
    missing, extra = leaves.keys() - weights.keys(), weights.keys() - leaves.keys()
    problems = [f'missing {key}' for key in missing if not (_matches(key, allow_missing) and _is_head(key))]
    problems += [f'unknown {key}' for key in extra if not _matches(key, allow_extra) or _is_backbone(key)]
    for key in leaves.keys() & weights.keys():
        shape = _torch_shape(*leaves[key], config)
        if weights[key].shape != shape:
            problems.append(f'{key} has shape {weights[key].shape}, wanted {shape}')
    if not problems:
        return
    problems.sort()
    more = f'; and {len(problems) - _MAX_NAMED} more' if len(problems) > _MAX_NAMED else ''
    required = [key for key in missing if _matches(key, allow_missing) and not _is_head(key)]
    required += [key for key in extra if _matches(key, allow_extra) and _is_backbone(key)]
    unknown = [key for key in extra if not _matches(key, allow_extra)]
    way_out = (f'. {", ".join(sorted(required)[:_MAX_NAMED])} cannot be left out: all outputs depend on such weights, '
               'so that only heads may be missing' if required else '')
    if len(problems) == len(unknown) and not any(map(_is_backbone, unknown)):
        way_out = f'. If logits do not depend on them, give {_flags_for(unknown)}'
    raise ValueError(f'weights do not fit the model ({len(problems)} problems): {"; ".join(problems[:_MAX_NAMED])}'
                     f'{more}{way_out}')


def _flags_for(extra):
    """Returns the flags that skip the given arrays, one flag for each module."""
    patterns = sorted({f'{key.rpartition(".")[0]}.*' if '.' in key else key for key in extra})[:_MAX_NAMED]
    return ' '.join(f"--allow_extra='{pattern}'" for pattern in patterns)


def to_torch(params: Params, config: ViTConfig, modules: Modules = NO_MODULES) -> dict[str, np.ndarray]:
    """Converts parameters to a state dict; the exact inverse of `from_torch`.

    Args:
      params: the parameters of a model.
      config: config of the model.
      modules: learned modules of the model's reducer.
    """
    out = {}
    for path, leaf in _flattened(params):
        out[key := _torch_key(path, modules)] = _from_flax(path, np.asarray(leaf), config)
        if key.endswith(_VARIANCE):
            out[key.removesuffix(_VARIANCE) + _COUNTER] = np.zeros((), np.int64)
    return out


def learned_modules(names: Iterable[str]) -> Modules:
    """Detects the learned modules of a reducer by the names of the arrays in a state dict.

    Modules of reducers with `has_sized_modules` are not detected.
    """
    names = list(names)
    reducers = map(get_reducer, list_reducers())
    candidates = (modules_of(reducer, names, reducer.checkpoint_prefix) for reducer in reducers)
    return next((modules for modules in candidates if modules.count), NO_MODULES)


@functools.lru_cache(maxsize=8)
def template(config: ViTConfig, modules: Modules = NO_MODULES) -> Params:
    """Returns the tree of the parameters of a model. Its leaves are shapes and dtypes instead of arrays.

    Do not change the tree: it is cached.
    """
    return jax.eval_shape(create(config, modules=modules).init, jax.random.key(0))


def resized(params: Params, config: ViTConfig, image_size: ImageSize | None) -> tuple[Params, ViTConfig]:
    """Returns the parameters and the config for another image size. Only the position embeddings change.

    Args:
      image_size: a side, or (height, width), in pixels; None: no change.

    Raises:
      ValueError: the image size is not a multiple of the patch size.
    """
    if image_size is None or image_size == config.image_size:
        return params, config
    config_after = dataclasses.replace(config, image_size=image_size)
    if not config.absolute_positions:
        return params, config_after
    logging.info('position embeddings resized from images of %s to %s', size_text(config.image_size),
                 size_text(image_size))
    positions = resize_positions(jnp.asarray(params['pos_embed'][0]), config.grid(), config_after.grid(),
                                 method=config.position_resize, prefix=config.num_prefix_positions)
    return params | {'pos_embed': np.asarray(positions)[None]}, config_after


def _flattened(params):
    """Returns (path, leaf) for every leaf. A path is a tuple of names and indices."""
    return [(tuple(key.key for key in keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(params)]


def _matches(key, patterns):
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _is_head(key):
    """Returns True for an array of a head. Training on other classes replaces the heads."""
    return key.split('.')[0] in ('head', 'head_dist', 'aux_head')


def _is_backbone(key):
    """Returns True if all outputs depend on the array. MAE's decoder and mask tokens are used only in pretraining."""
    return _BACKBONE.search(key) is not None and not key.startswith('decoder') and not key.endswith('mask_token')


def _torch_key(path, modules):
    if path[0] == PARAMS and modules.reducer is not None:
        path = (modules.reducer.checkpoint_prefix, *path[1:])
    return '.'.join(str(_NAMES.get(part, part)) for part in path)


def _is_patch_projection(path):
    return path == ('patch_embed', 'proj', 'kernel')


def _torch_shape(path, flax_shape, config):
    if _is_patch_projection(path):
        side = config.patch_side
        return flax_shape[1], flax_shape[0] // side**2, side, side
    if path[-1] == 'kernel' and len(flax_shape) == 4:
        return tuple(flax_shape[axis] for axis in (3, 2, 0, 1))
    return flax_shape[::-1] if path[-1] == 'kernel' else flax_shape


def _to_flax(path, value, flax_shape):
    """Converts an array of PyTorch. Its patch projection is a convolution; ours is a linear map of patches."""
    if path[-1] != 'kernel':
        return value
    return value.transpose(2, 3, 1, 0).reshape(flax_shape) if value.ndim == 4 else value.T


def _from_flax(path, value, config):
    if path[-1] != 'kernel':
        return value
    if _is_patch_projection(path):
        side = config.patch_side
        value = value.reshape(side, side, -1, value.shape[1])
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
