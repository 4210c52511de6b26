"""The weights of a run by themselves: kept, read, or the start of another run (of other classes or image size)."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax import models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import CheckpointManager, newest_step, read_newest
from evit_jax.checkpoints.state import TrainState
from evit_jax.configs.base import absent
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig
from evit_jax.models.layers import resize_positions
from evit_jax.reduction.reducer import PARAMS as REDUCER
from evit_jax.runtime import agreement, distributed, storage

Result = TypeVar('Result')

# Values for weights without a config: those of DeiT.
AS_DEIT = absent('model.reduce_at', 'model.fuse', 'reducer.name', 'keep.rate', 'data.mean', 'data.std',
                 'data.eval_crop')
_HEADS = ('head', 'head_dist', 'aux_head')
_FILES = ('.pth', '.pt', '.bin', '.ckpt', '.safetensors')  # suffixes of other programs' files
_HUGGING_FACE = ('model.safetensors', 'pytorch_model.bin')  # beginnings of file names in its folders
_SAID = 5  # problems named in one message


def save(folder: str | os.PathLike, params: Params, metadata: dict[str, Any]) -> None:
    """Writes weights as the checkpoint of step 0 of a run, to evaluate, to predict with, or to begin from.

    Args:
      folder: is made; what it holds is not looked at.
      about: what is known of config (nested) and class_names.

    Raises:
      ValueError: class_names is one text.
    """
    if isinstance(names := metadata.get('class_names', ()), str):
        raise ValueError(f'class_names={names!r} is one text: give a sequence with a name for each class')
    workdirs.write_config(folder, metadata)
    checkpoints = CheckpointManager(folder, keep=1)
    try:
        checkpoints.save(TrainState(jnp.zeros((), jnp.int32), params, None, ()), metadata)
        checkpoints.wait()
    finally:
        checkpoints.close()


def read(workdir: str | os.PathLike, like: Params) -> tuple[Params, Params | None, int]:
    """Weights, moving average (if there is one) and step of a run's newest checkpoint, as numpy arrays; reads only.

    Args:
      like: a tree of what has their shapes.

    Raises:
      ValueError: no readable checkpoint, or weights that do not fit or are not finite; names them.
    """
    params, ema, metadata = read_newest(workdir, 'params', 'ema')
    check_finite(params | {f'ema.{name}': value for name, value in ema.items()}, workdir)
    return fitted(params, like, workdir), fitted(ema, like, workdir) if ema else None, metadata['next_step']


def by_name(params: Params) -> dict[str, Any]:
    """The leaves by dotted path, as `fitted` takes them."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def fitted(weights: dict[str, np.ndarray], like: Params, workdir: str | os.PathLike) -> Params:
    """Arrays by dotted path, as `read_newest` gives them, in the tree of a model's parameters.

    Args:
      like: a tree of what has their shapes.
      workdir: whose they are.

    Raises:
      ValueError: they do not fit; names them.
    """
    _check_fit(weights, by_name(like), workdir)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: weights[_dotted(path)], like)


def check_finite(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Raises a ValueError that names the arrays with NaN or infinity, if there are any.

    Args:
      arrays: weights by dotted path.
      path: folder or file that holds them, for the message.
    """
    counts = {name: value.size - int(np.isfinite(value).sum()) for name, value in arrays.items()
              if jnp.issubdtype(value.dtype, jnp.inexact)}
    bad = [f'{name} ({count:,} of {arrays[name].size:,} values)' for name, count in sorted(counts.items()) if count]
    if bad:
        more = f' and {len(bad) - _SAID} more' if len(bad) > _SAID else ''
        raise ValueError(f'{path}: NaN or infinity stands in {len(bad)} of {len(arrays)} arrays: '
                         f'{", ".join(bad[:_SAID])}{more}. Results of such weights mean nothing: take an earlier '
                         'checkpoint, or the file that the weights came from')


def start_from(workdir: str | os.PathLike, fresh: Params, *, prefix: int, ema: bool,
               class_names: tuple[str, ...] = ()) -> Params:
    """The weights of a run's newest checkpoint, in place of a model's initial ones.

    Heads for another number of classes stay fresh, as do learned modules of the reducer and a second head that are
    not there. Learned modules that this model does not have are left out. Position embeddings of another image size
    are resized.

    Args:
      fresh: the model's initial parameters.
      prefix: tokens in front of the patches.
      ema: take the moving average of the weights.
      class_names: that the model is to tell apart.

    Raises:
      ValueError: no readable checkpoint, no average in it, or weights that do not fit or are not finite; names them.
    """
    weights, metadata = read_newest(workdir, 'ema' if ema else 'params')
    if not weights:
        raise ValueError(f'the run in {workdir} kept no moving average: start from its weights with '
                         '--config.init_ema=False')
    check_finite(weights, workdir)
    leaves = by_name(fresh)
    replaced = [name for name, leaf in leaves.items() if name.split('.')[0] in _HEADS and name in weights
                and weights[name].shape[-1] != leaf.shape[-1]]
    added = [name for name in leaves if name.startswith(f'{REDUCER}.') and name not in weights]
    left_out = [name for name in weights if name.startswith(f'{REDUCER}.') and name not in leaves]
    second = [name for name in leaves
              if name.startswith('head_dist.') and name not in weights and 'dist_token' in weights]
    weights |= {name: np.asarray(leaves[name]) for name in replaced + added + second}
    weights = {name: value for name, value in weights.items() if name not in left_out}
    if 'pos_embed' in weights:
        weights['pos_embed'] = _resized(weights['pos_embed'], leaves['pos_embed'].shape, prefix)
    params = fitted(weights, fresh, workdir)
    names = tuple(metadata.get('class_names', ()))
    logging.info('starting from the %s of %s at step %d%s', 'moving average' if ema else 'weights', workdir,
                 metadata['next_step'], f'; fresh for other classes: {", ".join(replaced)}' if replaced else '')
    if added:
        logging.info('fresh, as they are not there: %s', ', '.join(added))
    if second:
        logging.warning('head_dist starts from random values: the weights of %s have one head, that of the class token',
                        workdir)
    if left_out:
        logging.info('left out, as the reducer of this model has no such parameters: %s', ', '.join(left_out))
    if not replaced and names and class_names and names != class_names:
        logging.warning('the head is kept, as there are %d classes in both, but their names differ', len(names))
    return params


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config of weights, with DeiT's values and the named model's image size where it has none."""
    named = models.CONFIGS.get(config.get('model.name'))
    size = {} if named is None else {'model.image_size': named.image_size}
    return workdirs.flat(AS_DEIT) | size | dict(config)


def check_is_workdir(setting: str, path: str | os.PathLike) -> None:
    """Raises a ValueError for a file, or for a folder with weights of another program; names `convert`.

    Args:
      setting: that the path was given by, for the message.
    """
    if storage.is_remote(path):
        return
    place = storage.as_path(path)
    convert = f'python -m evit_jax.convert {os.fspath(path)} NEW_FOLDER'
    if place.is_file():
        raise ValueError(f'{setting}: {path} is a file: give the folder of a run; {convert} makes one of weights of '
                         'PyTorch or safetensors')
    if place.suffix in _FILES and not place.is_dir():
        raise ValueError(f'{setting}: {path} is not there, and a file of weights is no run: give the folder that '
                         f'{convert} makes of one')
    if place.is_dir() and newest_step(path) is None and any(
            file.name.startswith(_HUGGING_FACE) for file in place.iterdir()):
        raise ValueError(f'{setting}: {path} holds weights of another program, not a run: give the folder that '
                         f'{convert} makes of it')


def check_values(workdir: str | os.PathLike, model_config: ViTConfig) -> None:
    """Raises a ValueError where the weights in a workdir were trained with other values that no array shows.

    Args:
      shape: shape of the model that starts from them.
    """
    config = workdirs.saved_config(workdir)
    if config is None or config.get('model.name') not in models.CONFIGS:
        return
    there = models.config_from_flat(config)
    same = all(getattr(there, key) == getattr(model_config, key) for key in ('width', 'depth'))
    if not same or type(there) is not type(model_config):
        raise ValueError(f'the weights of {workdir} are of {config["model.name"]}, another model than this: give '
                         f'--config.model.name={config["model.name"]}')
    differ = [key for key in models.UNSHAPED if getattr(there, key) != getattr(model_config, key)]
    if there.one_head and model_config.distilled:
        differ = [key for key in differ if key != 'one_head']  # the second head starts fresh
    if differ:
        said = ', '.join(f'{key} {getattr(there, key)} there, {getattr(model_config, key)} here' for key in differ)
        keys = ' '.join(f'--config.model.{key}={getattr(there, key)}' for key in differ)
        raise ValueError(f'the weights of {workdir} are of a model with other values ({said}), with which their '
                         f'numbers mean something else: give {keys}')


def _dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator='.')


def _resized(positions, wanted, prefix):
    """Position embeddings [1, prefix + N, D] for the shape wanted, if the grid is all that differs."""
    side = round((wanted[1] - prefix) ** 0.5)
    patches = positions.shape[1] - prefix
    if positions.shape == wanted or positions.shape[2] != wanted[2] or round(patches ** 0.5) ** 2 != patches:
        return positions
    grid = resize_positions(jnp.asarray(positions[0, prefix:]), side)
    return np.concatenate([positions[0, :prefix], grid])[None]


def _check_fit(weights, leaves, workdir):
    problems = [f'{name} is missing there' for name in leaves.keys() - weights.keys()]
    problems += [f'{name} is unknown here' for name in weights.keys() - leaves.keys()]
    problems += [f'{name} has shape {weights[name].shape}, wanted {leaves[name].shape}'
                 for name in leaves.keys() & weights.keys() if weights[name].shape != leaves[name].shape]
    if problems:
        more = f'; and {len(problems) - _SAID} more' if len(problems) > _SAID else ''
        raise ValueError(f'the weights of {workdir} do not fit this model ({len(problems)} differ): '
                         f'{"; ".join(sorted(problems)[:_SAID])}{more}. Set config.model as it was there')


def same_weights(path: str | os.PathLike, read: Callable[[], Result],
                 arrays_of: Callable[[Result], Any] = lambda found: found) -> Result:
    """Reads the weights of the newest checkpoint of a run in every process, and compares them.

    Args:
      path: workdir of the run.
      arrays_of: the result to a tree of arrays.

    Raises:
      Exception, ValueError: as in `on_every_process` and `check_same`.
    """
    found = agreement.on_every_process(read)
    if not distributed.is_single_process():
        agreement.check_same({f'the step of the newest checkpoint in {path}': path and newest_step(path),
                              f'the weights of {path}': agreement.digest_tree(arrays_of(found))},
                             'let all processes read the same checkpoint, and start again')
    return found
