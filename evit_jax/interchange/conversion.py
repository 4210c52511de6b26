"""Converts models of other programs to workdirs, and runs to safetensors files."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import CUSTOM
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange import hub, run_metadata, safetensors_file, timm_calls, torch_weights, verification
from evit_jax.interchange.pretrained_model import locate, missing_file, read_pretrained
from evit_jax.models import config_from_flat
from evit_jax.models.config import ImageSize
from evit_jax.reduction.reducer import modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage


def to_workdir(src: str | os.PathLike, dst: str | os.PathLike, *, check: bool = False,
               image_size: ImageSize | None = None, **options: Any) -> None:
    """Converts the model of another program to a workdir. `--config.init_from` and `evit_jax.predict` accept it.

    Args:
      src: path or Hub name of the model, as in `read_pretrained`.
      dst: path of the folder to create.
      check: compare the outputs with those of timm or transformers first; see `verification.check`.
      image_size: resize the position embeddings for images of this size.
      **options: keyword arguments of `read_pretrained`.

    Raises:
      FileNotFoundError: `src` does not exist.
      ValueError: `dst` exists, or `src` is refused, or the outputs differ.
    """
    _check_paths(src, dst)
    if os.fspath(dst).endswith(('.safetensors', '.pth', '.pt')):
        raise ValueError(f'{dst} is the name of a file, but {src} is converted to a folder: give the name of a new '
                         'folder')
    model = read_pretrained(src, image_size=None if check else image_size, **options)
    if check:
        verification.check(locate(src)[1], model.params, model.config)
        model = model.resized(image_size)
    metadata, (leaves, tree) = model.metadata, jax.tree.flatten(model.params)
    del model  # else the arrays stay in memory twice
    for index, leaf in enumerate(leaves):
        leaves[index] = jnp.asarray(leaf)  # Orbax copies NumPy arrays before it writes them, but not JAX arrays
    with storage.new_folder(dst) as folder:
        weights.save(folder, jax.tree.unflatten(tree, leaves), metadata)
    logging.info('%s is written: start from it with --config.init_from=%s', dst, dst)


def to_safetensors(src: str | os.PathLike, dst: str | os.PathLike, *, ema: bool = False,
                   image_size: ImageSize | None = None) -> None:
    """Writes the newest weights of a run to a safetensors file, in the layout of timm or of LV-ViT's authors.

    Args:
      src: workdir of the run.
      dst: path of the file to create.
      ema: write the moving average of the weights.
      image_size: resize the position embeddings for images of this size.

    Raises:
      FileNotFoundError: `src` does not exist.
      ValueError: `dst` exists, `src` is not the workdir of a run, or the run has no moving average.
    """
    _check_paths(src, dst)
    if storage.is_remote(dst) or not os.fspath(dst).endswith('.safetensors'):
        raise ValueError(f'{src} is a folder: if it is a run, give as DST a local file name that ends in .safetensors; '
                         'if not, give the file of weights in it')
    config = workdir.saved_config(src)
    if config is None:
        raise ValueError(f'{src} is not the workdir of a run: it holds no {workdir.CONFIG_FILE}')
    name = config.get('model.name', CUSTOM)
    model_config = config_from_flat(config, model_configs.saved_in(config))
    arrays, metadata = read_newest(src, 'ema' if ema else 'params')
    if not arrays:
        raise ValueError(f'the run in {src} kept no moving average: leave out --ema')
    reducer = get_reducer(config.get('reducer.name', 'evit'))
    if reducer.has_sized_modules:
        raise ValueError(f'{src}: PyTorch checkpoints have no layout for the learned modules of reducer {reducer}: use '
                         'the run itself, as in evit_jax.load')
    modules = modules_of(reducer, arrays)
    params = weights.fitted(arrays, torch_weights.template(model_config, modules), src)
    params, model_config = torch_weights.resized(params, model_config, image_size)
    arrays = torch_weights.to_torch(params, model_config, modules)
    weights.check_finite(arrays, src)
    timm = timm_calls.timm_model(model_config, arrays) if not modules.count else 'timm has no model with this reducer'
    written, timm_name = (arrays, '') if isinstance(timm, str) else (
        timm.arrays, '' if timm.arguments.keys() - {'img_size', 'num_classes'} else timm.name)
    safetensors_file.write(dst, written, run_metadata.to_metadata(model_config, config, timm_name))
    logging.info('%s of step %d written to %s', 'moving average' if ema else 'weights', metadata['next_step'], dst)
    if isinstance(timm, str):
        logging.warning('timm has no model like %s (%s): the file can only be converted back', name, timm)
    else:
        logging.info('in timm: %s', timm.code(dst))


def _check_paths(src, dst):
    if not hub.is_hub_name(src) and not storage.as_path(src).exists():
        raise FileNotFoundError(missing_file(src))
    if storage.as_path(dst).exists():
        raise ValueError(f'{dst} exists, and is not overwritten: give another DST')
