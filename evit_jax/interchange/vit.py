"""Weights in the layout of PyTorch's DeiT (timm) or LV-ViT <-> this project's parameters, as dicts of numpy arrays.

The one thing that does not come along is how many batches a BatchNorm of PyTorch has seen, which it only needs where it
keeps a plain mean of them: it is written as 0.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax.models import Params, create
from evit_jax.models.config import ViTConfig
from evit_jax.models.layers import resize_positions
from evit_jax.reduction.reducer import NO_MODULES, PARAMS, Modules, modules_of
from evit_jax.reduction.registry import get_reducer, list_reducers

_NAMES = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}
_VARIANCE, _COUNTER = '.running_var', '.num_batches_tracked'  # of BatchNorm

_BACKBONE = re.compile(
    r'^((vit|deit)\.)?(blocks|layers?|encoder|embeddings|patch_embed|pos_embed|cls_token|dist_token|reg_token|norm|fc_norm|'
    r'norm_pre|layernorm|pre_logits|score_predictor|rope|rel_pos_bias)(\.|$)|(^|\.)(gamma\w*|ls\d|layer_scale\w*)(\.|$)')


def from_torch(weights: Mapping[str, Any], config: ViTConfig, *, allow_missing: Sequence[str] = (),
               allow_extra: Sequence[str] = ()) -> Params:
    """PyTorch's weights as the parameters of a model, in float32.

    Args:
      weights: state_dict key -> array; linear [out, in], convolution [out, in, height, width].
      allow_missing: patterns, as 'head.*', of keys that get initial values where they are missing.
      allow_extra: patterns of keys that are left out where the model has none such.

    Raises:
      ValueError: other keys are missing, unknown or of another shape; lists them.
    """
    modules = learned_modules(weights)
    leaves = {_torch_key(path, modules): (path, leaf.shape) for path, leaf in _template(config, modules)}
    weights = {key: value for key, value in weights.items() if not key.endswith(_COUNTER)}
    missing, extra = leaves.keys() - weights.keys(), weights.keys() - leaves.keys()
    problems = [f'missing {key}' for key in missing if not (matches([key], allow_missing) and _is_head(key))]
    problems += [f'unknown {key}' for key in extra if not matches([key], allow_extra) or _computes(key)]
    for key in leaves.keys() & weights.keys():
        wanted = _torch_shape(*leaves[key], config)
        if weights[key].shape != wanted:
            problems.append(f'{key} has shape {weights[key].shape}, wanted {wanted}')
    if problems:
        kept = [key for key in missing if matches([key], allow_missing) and not _is_head(key)]
        kept += [key for key in extra if matches([key], allow_extra) and _computes(key)]
        unknown = [key for key in extra if not matches([key], allow_extra)]
        why = (f'. {", ".join(sorted(kept))} may not be let go of: every number is computed with such weights, so that '
               'only heads may be missing' if kept else '')
        if len(problems) == len(unknown) and not any(map(_computes, unknown)):
            why = f'. If logits do not depend on them, give {_flags_for(unknown)}'
        raise ValueError(f'weights do not fit the model ({len(problems)} problems): {"; ".join(sorted(problems))}{why}')
    fresh = to_torch(create(config, modules=modules).init(jax.random.key(0)), config, modules) if missing else {}
    if missing:
        logging.warning('fresh, as they are missing: %s. They are random: predictions of this model mean nothing '
                        'until it is trained', ', '.join(sorted(missing)))
    if extra:
        logging.warning('left out, as the model has none such: %s. Where the other program computes its logits with '
                        'them, these are others', ', '.join(sorted(extra)))
    params: Params = {}
    for key, (path, wanted) in leaves.items():
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        with np.errstate(over='ignore'):  # becomes infinity
            value = np.asarray(fresh[key] if key in missing else weights[key]).astype(np.float32, copy=False)
        node[path[-1]] = _to_flax(path, value, wanted)
    return params


def _flags_for(extra):
    """The flags that leave out some arrays, a module at a time."""
    patterns = sorted({f'{key.rpartition(".")[0]}.*' if '.' in key else key for key in extra})
    return ' '.join(f"--allow_extra='{pattern}'" for pattern in patterns)


def to_torch(params: Params, config: ViTConfig, modules: Modules = NO_MODULES) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, exactly."""
    out = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(key.key for key in keys)
        out[key := _torch_key(path, modules)] = _from_flax(path, np.asarray(leaf), config)
        if key.endswith(_VARIANCE):
            out[key.removesuffix(_VARIANCE) + _COUNTER] = np.zeros((), np.int64)
    return out


def learned_modules(names: Iterable[str]) -> Modules:
    """Returns the learned modules that PyTorch weights contain, by the names of the arrays."""
    names = list(names)
    found = (modules_of(reducer, names, reducer.checkpoint_prefix) for reducer in map(get_reducer, list_reducers()))
    return next((modules for modules in found if modules.count), NO_MODULES)


def template(config: ViTConfig, modules: Modules = NO_MODULES) -> Params:
    """The parameters of a model as shapes alone."""
    return jax.eval_shape(create(config, modules=modules).init, jax.random.key(0))


def resized(params: Params, config: ViTConfig, image_size: int) -> tuple[Params, ViTConfig]:
    """Parameters and shape for another image size: the position embeddings are resized.

    Raises:
      ValueError: the size is not a multiple of the patch.
    """
    positions, prefix = params['pos_embed'], config.num_prefix_tokens
    side = math.isqrt(config.patches(image_size))
    grid = np.asarray(resize_positions(jnp.asarray(positions[0, prefix:]), side))
    return (params | {'pos_embed': np.concatenate([positions[0, :prefix], grid])[None]},
            dataclasses.replace(config, image_size=image_size))


def _template(config, modules):
    return [(tuple(key.key for key in keys), leaf)
            for keys, leaf in jax.tree_util.tree_leaves_with_path(template(config, modules))]


def matches(keys: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether every key is like one of the patterns."""
    return all(any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns) for key in keys)


def _is_head(key):
    """True for an array of a head. Training on other classes replaces heads."""
    return key.split('.')[0] in ('head', 'head_dist', 'aux_head')


def _computes(key):
    """True for an array that every image goes through before it reaches a head."""
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
    """A patch projection is a convolution in PyTorch and, on flattened patches, a linear map here."""
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
