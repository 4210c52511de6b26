"""Weights in the layout of PyTorch's DeiT (timm) <-> this project's parameters, as dicts of numpy arrays."""

from collections.abc import Mapping

import jax
import numpy as np

from evit_jax.models import Params, create
from evit_jax.models.vit import ViTShape


def from_torch(weights: Mapping[str, np.ndarray], shape: ViTShape) -> Params:
    """PyTorch's DeiT weights as the parameters of a model.

    Args:
      weights: state_dict key -> array; linear [out, in], convolution [out, in, height, width].

    Raises:
      ValueError: keys are missing, unknown or of another shape; lists them.
    """
    leaves = {_torch_key(path): (path, leaf.shape) for path, leaf in _template(shape)}
    problems = [f'missing {key}' for key in leaves if key not in weights]
    problems += [f'unknown {key}' for key in weights if key not in leaves]
    params: Params = {}
    for key in leaves.keys() & weights.keys():
        path, wanted = leaves[key]
        value = np.asarray(weights[key])
        if value.shape != _torch_shape(path, wanted, shape):
            problems.append(f'{key} has shape {value.shape}, wanted {_torch_shape(path, wanted, shape)}')
            continue
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = _to_flax(path, value, wanted)
    if problems:
        raise ValueError(f'weights do not fit the model ({len(problems)} problems): ' + '; '.join(sorted(problems)))
    return params


def to_torch(params: Params, shape: ViTShape) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, exactly."""
    out = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = tuple(key.key for key in keys)
        out[_torch_key(path)] = _from_flax(path, np.asarray(leaf), shape)
    return out


def _template(shape):
    tree = jax.eval_shape(create(shape).init, jax.random.key(0))
    return [(tuple(key.key for key in keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _torch_key(path):
    names = {'kernel': 'weight', 'scale': 'weight'}
    return '.'.join(str(names.get(part, part)) for part in path)


def _is_patch_projection(path):
    return path == ('patch_embed', 'proj', 'kernel')


def _patch_side(shape):
    return 1 if shape.stem else shape.patch_size


def _torch_shape(path, flax_shape, shape):
    if _is_patch_projection(path):
        side = _patch_side(shape)
        return flax_shape[1], flax_shape[0] // side**2, side, side
    if path[-1] == 'kernel' and len(flax_shape) == 4:
        return tuple(flax_shape[axis] for axis in (3, 2, 0, 1))
    return flax_shape[::-1] if path[-1] == 'kernel' else flax_shape


def _to_flax(path, value, flax_shape):
    """A patch projection is a convolution in PyTorch and, on flattened patches, a linear map here."""
    if path[-1] != 'kernel':
        return value
    return value.transpose(2, 3, 1, 0).reshape(flax_shape) if value.ndim == 4 else value.T


def _from_flax(path, value, shape):
    if path[-1] != 'kernel':
        return value
    if _is_patch_projection(path):
        side = _patch_side(shape)
        value = value.reshape(side, side, -1, value.shape[1])
    return value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
