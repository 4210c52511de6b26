"""Saves and reads weights without the training state, and starts runs from the weights of other runs."""

import math
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
from evit_jax.checkpoints.state import HEADS, TrainState
from evit_jax.configs.base import absent
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig
from evit_jax.models.positions import resize_positions
from evit_jax.reduction.reducer import PARAMS as REDUCER
from evit_jax.runtime import agreement, distributed, storage

Result = TypeVar('Result')

# Config values for weights without a config: those of DeiT.
AS_DEIT = absent('model.reduce_at', 'model.fuse', 'reducer.name', 'keep.rate', 'data.mean', 'data.std',
                 'data.eval_crop', 'data.interpolation')
_FILES = ('.pth', '.pt', '.bin', '.ckpt', '.safetensors')  # suffixes of the weight files of other libraries
_HUGGING_FACE = ('model.safetensors', 'pytorch_model.bin')  # prefixes of the weight files in Hugging Face folders
_MAX_NAMED = 5  # maximal number of problems in an error message


def save(folder: str | os.PathLike, params: Params, metadata: dict[str, Any]) -> None:
    """Writes weights as the checkpoint of step 0 of a run.

    Args:
      folder: workdir to write to; created if it does not exist.
      metadata: 'config' (nested), and 'class_names' and 'model_config' if known.

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
    """Reads the weights, their EMA (or None) and the step of the newest checkpoint of a run, as numpy arrays.

    Args:
      like: tree of arrays, or of anything else with shapes, that the weights must match.

    Raises:
      ValueError: there is no readable checkpoint, or weights do not match `like` or are not finite. The message names
        the arrays.
    """
    params, ema, metadata = read_newest(workdir, 'params', 'ema')
    check_finite(params | {f'ema.{name}': value for name, value in ema.items()}, workdir)
    return fitted(params, like, workdir), fitted(ema, like, workdir) if ema else None, metadata['next_step']


def by_name(params: Params) -> dict[str, Any]:
    """Returns the parameters by dotted path, such as 'blocks.0.norm1.bias'."""
    return {_dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def fitted(weights: dict[str, np.ndarray], like: Params, workdir: str | os.PathLike) -> Params:
    """Converts arrays by dotted path into a parameter tree.

    Args:
      weights: arrays by dotted path, from `read_newest`.
      like: tree of arrays, or of anything else with shapes, that the weights must match.
      workdir: origin of the weights, for the error message.

    Raises:
      ValueError: arrays are missing, unknown, or have another shape. The message names the arrays.
    """
    _check_fit(weights, by_name(like), workdir)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: weights[_dotted(path)], like)


def check_finite(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> None:
    """Raises a ValueError if arrays contain NaN or infinity. The message names the arrays.

    Args:
      arrays: weights by dotted path.
      path: folder or file of the weights, for the error message.
    """
    counts = {name: value.size - int(np.isfinite(value).sum()) for name, value in arrays.items()
              if jnp.issubdtype(value.dtype, jnp.inexact)}
    bad = [f'{name} ({count:,} of {arrays[name].size:,} values)' for name, count in sorted(counts.items()) if count]
    if bad:
        more = f' and {len(bad) - _MAX_NAMED} more' if len(bad) > _MAX_NAMED else ''
        raise ValueError(f'{path}: NaN or infinity stands in {len(bad)} of {len(arrays)} arrays: '
                         f'{", ".join(bad[:_MAX_NAMED])}{more}. Results of such weights mean nothing: take an earlier '
                         'checkpoint, or the file that the weights came from')


def start_from(workdir: str | os.PathLike, fresh: Params, *, config: ViTConfig, ema: bool,
               class_names: tuple[str, ...] = ()) -> Params:
    """Returns the initial parameters of a model that starts from the newest checkpoint of a run.

    A head for another number of classes is initialised randomly. So are a head, a second head and learned modules of
    the reducer if the checkpoint lacks them. Learned modules that the model lacks are ignored. Position embeddings are
    resized if the image size differs.

    Args:
      fresh: random initial parameters of the model.
      config: config of the model.
      ema: use the EMA of the weights.
      class_names: classes of the model.

    Raises:
      ValueError: there is no readable checkpoint or no EMA, or weights do not match the model or are not finite.
    """
    weights, metadata = read_newest(workdir, 'ema' if ema else 'params')
    if not weights:
        raise ValueError(f'the run in {workdir} kept no moving average: start from its weights with '
                         '--config.init_ema=False')
    check_finite(weights, workdir)
    leaves = by_name(fresh)
    replaced = [name for name in leaves if _is_replaced(name.split('.')[0], weights, leaves)]
    weights, added = _with_fresh(weights, leaves, replaced, workdir)
    if 'pos_embed' in weights:
        weights['pos_embed'] = _resized(weights['pos_embed'], config, metadata.get(model_configs.KEY))
    params = fitted(weights, fresh, workdir)
    names = tuple(metadata.get('class_names', ()))
    logging.info('starting from the %s of %s at step %d%s', 'moving average' if ema else 'weights', workdir,
                 metadata['next_step'], f'; fresh for other classes: {", ".join(replaced)}' if replaced else '')
    if added:
        logging.info('fresh, as they are not there: %s', ', '.join(added))
    if not replaced and names and class_names and names != class_names:
        logging.warning('the head is kept, as there are %d classes in both, but their names differ', len(names))
    return params


def _is_replaced(head, weights, leaves):
    """Returns True for a head that starts at random: its weights are for other classes, or there is no `head`."""
    names = [name for name in leaves if name.split('.')[0] == head]
    there = [name for name in names if name in weights]
    return head in HEADS and (any(weights[name].shape[-1] != leaves[name].shape[-1] for name in there)
                              or (head == 'head' and len(there) < len(names)))


def _with_fresh(weights, leaves, replaced, workdir):
    """Adds initial parameters that the weights lack, and removes unknown learned modules of the reducer.

    Returns:
      The weights by dotted path, and the names of the added parameters of the reducer.
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
    """Completes the flat config of weights: absent keys get DeiT's values and the image size of the named model."""
    named = models.CONFIGS.get(config.get('model.name'))
    size = {} if named is None else {'model.image_size': named.image_size}
    config = workdirs.flat(AS_DEIT) | size | dict(config)
    if image_size := models.image_size_of(config):  # converted weights of rectangles have a pair
        config |= {f'model.{key}': value for key, value in models.image_size_keys(image_size).items()}
    return config


def check_is_workdir(setting: str, path: str | os.PathLike) -> None:
    """Checks that a path is not a file or folder with weights of another library.

    Args:
      setting: name of the flag or config key with the path, for the error message.

    Raises:
      ValueError: the path has weights of another library. The message gives the command that converts them.
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
    """Returns True for a Hugging Face or timm folder with PyTorch or safetensors weights."""
    return any(file.name.startswith(_HUGGING_FACE) for file in folder.iterdir())


def check_values(workdir: str | os.PathLike, model_config: ViTConfig) -> None:
    """Checks that weights were trained with the same values of the fields in `NOT_IN_SHAPES`.

    Args:
      workdir: folder of the weights.
      model_config: config of the model that starts from the weights.

    Raises:
      ValueError: the weights are of another model, or a value differs. The message gives the flags to set.
    """
    config = workdirs.saved_config(workdir)
    if config is None or not (model_configs.KEY in config or config.get('model.name') in models.CONFIGS):
        return
    there = models.config_from_flat(config, model_configs.saved_in(config))
    same = all(getattr(there, key) == getattr(model_config, key) for key in ('width', 'depth'))
    if not same or type(there) is not type(model_config):
        raise ValueError(f'the weights of {workdir} are of {config["model.name"]}, another model than this: give '
                         f'--config.model.name={config["model.name"]}')
    differ = [key for key in models.NOT_IN_SHAPES if getattr(there, key) != getattr(model_config, key)]
    if there.one_head and model_config.distilled:
        differ = [key for key in differ if key != 'one_head']  # the second head is initialised randomly
    if differ:
        values = ', '.join(f'{key} {getattr(there, key)} there, {getattr(model_config, key)} here' for key in differ)
        keys = ' '.join(f'--config.model.{key}={getattr(there, key)}' for key in differ)
        raise ValueError(f'the weights of {workdir} are of a model with other values ({values}), with which their '
                         f'numbers mean something else: give {keys}')


def _dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator='.')


def _resized(positions, config, stored):
    """Resizes position embeddings [1, F + N, D]. They are unchanged if more than the grid size differs.

    Args:
      stored: the model config that is stored with them, as JSON; None: their grid is a square.
    """
    prefix = config.num_prefix_positions
    patches = positions.shape[1] - prefix
    old = model_configs.from_json(stored).grid() if stored else (math.isqrt(max(patches, 0)),) * 2
    if math.prod(old) != patches or positions.shape[2] != config.width:
        return positions
    resized = resize_positions(jnp.asarray(positions[0]), old, config.grid(), method=config.position_resize,
                               prefix=prefix)
    return np.asarray(resized)[None]


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
    """Reads weights in every process, and checks that all processes read equal weights.

    Args:
      path: workdir of the run. The step of its newest checkpoint is compared, too.
      read: function that reads the weights.
      arrays_of: result of `read` -> tree of arrays.

    Raises:
      ValueError: the processes read different weights, or `read` raised an error in a process.
    """
    result = agreement.on_every_process(read)
    if not distributed.is_single_process():
        agreement.check_same({f'the step of the newest checkpoint in {path}': path and newest_step(path),
                              f'the weights of {path}': agreement.digest_tree(arrays_of(result))},
                             'let all processes read the same checkpoint, and start again')
    return result
