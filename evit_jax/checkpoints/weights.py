"""Weights without training state: saved, read, and used as the initial weights of another run."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
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
_FILES = ('.pth', '.pt', '.bin', '.ckpt', '.safetensors')  # suffixes of weight files of other programs
_HUGGING_FACE = ('model.safetensors', 'pytorch_model.bin')  # prefixes of file names in Hugging Face's folders
_MAX_NAMED = 5  # problems named in one message


def save(folder: str | os.PathLike, params: Params, metadata: dict[str, Any]) -> None:
    """Writes weights as the checkpoint of step 0 of a run.

    Args:
      folder: workdir to write to; created if it does not exist.
      metadata: 'config' (nested) and, if known, 'class_names' and 'model_config'.

    Raises:
      ValueError: class_names is a str.
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
    """Reads weights, moving average (None if there is none) and step of a run's newest checkpoint, as numpy arrays.

    Args:
      like: tree of arrays, or of anything else with shapes, that the weights must match.

    Raises:
      ValueError: no readable checkpoint, or weights that do not fit or are not finite; names the arrays.
    """
    params, ema, metadata = read_newest(workdir, 'params', 'ema')
    check_finite(params | {f'ema.{name}': value for name, value in ema.items()}, workdir)
    return fitted(params, like, workdir), fitted(ema, like, workdir) if ema else None, metadata['next_step']


def by_name(params: Params) -> dict[str, Any]:
    """The parameters by dotted path, as in 'blocks.0.norm1.bias'."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def fitted(weights: dict[str, np.ndarray], like: Params, workdir: str | os.PathLike) -> Params:
    """Puts arrays by dotted path into the tree of a model's parameters.

    Args:
      weights: as `read_newest` returns them.
      like: tree of arrays, or of anything else with shapes, that the weights must match.
      workdir: origin of the weights, for the message.

    Raises:
      ValueError: arrays are missing, unknown, or of another shape; names them.
    """
    _check_fit(weights, by_name(like), workdir)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: weights[_dotted(path)], like)


def check_finite(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Raises a ValueError if arrays hold NaN or infinity; names these arrays.

    Args:
      arrays: weights by dotted path.
      path: folder or file of the weights, for the message.
    """
    counts = {name: value.size - int(np.isfinite(value).sum()) for name, value in arrays.items()
              if jnp.issubdtype(value.dtype, jnp.inexact)}
    bad = [f'{name} ({count:,} of {arrays[name].size:,} values)' for name, count in sorted(counts.items()) if count]
    if bad:
        more = f' and {len(bad) - _MAX_NAMED} more' if len(bad) > _MAX_NAMED else ''
        raise ValueError(f'{path}: NaN or infinity stands in {len(bad)} of {len(arrays)} arrays: '
                         f'{", ".join(bad[:_MAX_NAMED])}{more}. Results of such weights mean nothing: take an earlier '
                         'checkpoint, or the file that the weights came from')


def start_from(workdir: str | os.PathLike, fresh: Params, *, prefix: int, ema: bool,
               class_names: tuple[str, ...] = ()) -> Params:
    """Returns the initial parameters of a model, with the weights of a run's newest checkpoint where they fit.

    Heads for another number of classes keep their initial values, as do a second head and learned modules of the
    reducer that the checkpoint lacks. Learned modules that the model lacks are left out. Position embeddings are
    resized if the image size differs.

    Args:
      fresh: initial parameters of the model.
      prefix: number of prefix tokens.
      ema: use the moving average of the weights.
      class_names: classes of the model.

    Raises:
      ValueError: no readable checkpoint, no moving average, or weights that do not fit or are not finite.
    """
    weights, metadata = read_newest(workdir, 'ema' if ema else 'params')
    if not weights:
        raise ValueError(f'the run in {workdir} kept no moving average: start from its weights with '
                         '--config.init_ema=False')
    check_finite(weights, workdir)
    leaves = by_name(fresh)
    replaced = [name for name, leaf in leaves.items() if name.split('.')[0] in _HEADS and name in weights
                and weights[name].shape[-1] != leaf.shape[-1]]
    weights, added = _with_fresh(weights, leaves, replaced, workdir)
    if 'pos_embed' in weights:
        weights['pos_embed'] = _resized(weights['pos_embed'], leaves['pos_embed'].shape, prefix)
    params = fitted(weights, fresh, workdir)
    names = tuple(metadata.get('class_names', ()))
    logging.info('starting from the %s of %s at step %d%s', 'moving average' if ema else 'weights', workdir,
                 metadata['next_step'], f'; fresh for other classes: {", ".join(replaced)}' if replaced else '')
    if added:
        logging.info('fresh, as they are not there: %s', ', '.join(added))
    if not replaced and names and class_names and names != class_names:
        logging.warning('the head is kept, as there are %d classes in both, but their names differ', len(names))
    return params


def _with_fresh(weights, leaves, replaced, workdir):
    """Adds the initial parameters that weights lack, and leaves out unknown modules of a reducer.

    Returns:
      The weights by dotted path, and the names of the reducer's parameters that were added.
    """
    added = [name for name in leaves if name.startswith(f'{REDUCER}.') and name not in weights]
    left_out = [name for name in weights if name.startswith(f'{REDUCER}.') and name not in leaves]
    second = [name for name in leaves
              if name.startswith('head_dist.') and name not in weights and 'dist_token' in weights]
    if second:
        logging.warning('head_dist starts from random values: the weights of %s have one head, that of the class token',
                        workdir)
    if left_out:
        logging.info('left out, as the reducer of this model has no such parameters: %s', ', '.join(left_out))
    weights = weights | {name: np.asarray(leaves[name]) for name in replaced + added + second}
    return {name: value for name, value in weights.items() if name not in left_out}, added


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Completes the flat config of weights: absent keys have DeiT's values, and the image size of the named model."""
    named = models.CONFIGS.get(config.get('model.name'))
    size = {} if named is None else {'model.image_size': named.image_size}
    return workdirs.flat(AS_DEIT) | size | dict(config)


def check_is_workdir(setting: str, path: str | os.PathLike) -> None:
    """Checks that a path is not a file, or a folder, with weights of another program.

    Args:
      setting: name of the flag or config key with the path, for the message.

    Raises:
      ValueError: it is; the message gives the command that converts it.
    """
    if storage.is_remote(path):
        return
    folder = storage.as_path(path)
    convert = f'python -m evit_jax.convert {os.fspath(path)} NEW_FOLDER'
    if folder.is_file():
        raise ValueError(f'{setting}: {path} is a file: give the folder of a run; {convert} makes one of weights of '
                         'PyTorch or safetensors')
    if folder.suffix in _FILES and not folder.is_dir():
        raise ValueError(f'{setting}: {path} is not there, and a file of weights is no run: give the folder that '
                         f'{convert} makes of one')
    if folder.is_dir() and newest_step(path) is None and holds_hugging_face(folder):
        raise ValueError(f'{setting}: {path} holds weights of another program, not a run: give the folder that '
                         f'{convert} makes of it')


def holds_hugging_face(folder: epath.Path) -> bool:
    """True for a folder of Hugging Face or timm with weights in PyTorch's format or in safetensors."""
    return any(file.name.startswith(_HUGGING_FACE) for file in folder.iterdir())


def check_values(workdir: str | os.PathLike, model_config: ViTConfig) -> None:
    """Checks that weights were trained with the values of a model that no array shape shows.

    Args:
      workdir: folder of the weights.
      model_config: model that starts from them.

    Raises:
      ValueError: the weights are of another model, or a value differs; the message gives the flags to set.
    """
    config = workdirs.saved_config(workdir)
    if config is None or not (model_configs.KEY in config or config.get('model.name') in models.CONFIGS):
        return
    there = models.config_from_flat(config, model_configs.saved_in(config))
    same = all(getattr(there, key) == getattr(model_config, key) for key in ('width', 'depth'))
    if not same or type(there) is not type(model_config):
        raise ValueError(f'the weights of {workdir} are of {config["model.name"]}, another model than this: give '
                         f'--config.model.name={config["model.name"]}')
    differ = [key for key in models.UNSHAPED if getattr(there, key) != getattr(model_config, key)]
    if there.one_head and model_config.distilled:
        differ = [key for key in differ if key != 'one_head']  # the second head starts fresh
    if differ:
        values = ', '.join(f'{key} {getattr(there, key)} there, {getattr(model_config, key)} here' for key in differ)
        keys = ' '.join(f'--config.model.{key}={getattr(there, key)}' for key in differ)
        raise ValueError(f'the weights of {workdir} are of a model with other values ({values}), with which their '
                         f'numbers mean something else: give {keys}')


def _dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator='.')


def _resized(positions, wanted, prefix):
    """Position embeddings [1, prefix + N, D] resized to the wanted shape; unchanged if more than the grid differs."""
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
        more = f'; and {len(problems) - _MAX_NAMED} more' if len(problems) > _MAX_NAMED else ''
        raise ValueError(f'the weights of {workdir} do not fit this model ({len(problems)} differ): '
                         f'{"; ".join(sorted(problems)[:_MAX_NAMED])}{more}. Set config.model as it was there')


def same_weights(path: str | os.PathLike, read: Callable[[], Result],
                 arrays_of: Callable[[Result], Any] = lambda result: result) -> Result:
    """Reads weights in every process, and checks that all processes read the same.

    Args:
      path: workdir of the run; its newest checkpoint is compared, too.
      read: reads the weights.
      arrays_of: result of `read` -> tree of arrays.

    Raises:
      ValueError: the processes read different weights, or `read` raised an error in one of them.
    """
    result = agreement.on_every_process(read)
    if not distributed.is_single_process():
        agreement.check_same({f'the step of the newest checkpoint in {path}': path and newest_step(path),
                              f'the weights of {path}': agreement.digest_tree(arrays_of(result))},
                             'let all processes read the same checkpoint, and start again')
    return result
