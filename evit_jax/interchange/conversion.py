"""Converts models of other programs to workdirs, and runs to safetensors files."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange import (
    architecture,
    checkpoint_layouts,
    hub,
    hyperparameters,
    run_metadata,
    safetensors_file,
    torch_weights,
    weight_files,
)
from evit_jax.interchange.hyperparameter_sources import CONFIG_KEYS
from evit_jax.models import Params, config_from_flat
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.reducer import modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage


class PretrainedModel(NamedTuple):
    """A model read from the file of another program."""

    name: str                 # key of `models.CONFIGS`
    config: ViTConfig
    params: Params            # NumPy arrays, float32
    metadata: dict[str, Any]  # 'config': nested dict of config keys; 'class_names': list, only if known


def read_pretrained(path: str | os.PathLike, *, ema: bool = False, key: str = '', image_size: int | None = None,
                    class_names: str | os.PathLike | None = None, allow_missing: Sequence[str] = (),
                    allow_extra: Sequence[str] = (), **values: Any) -> PretrainedModel:
    """Reads a model from a PyTorch or safetensors file, a Hugging Face or timm folder, or the Hugging Face Hub.

    Args:
      path: a file (.pth, .pt, .bin, .safetensors), an index of shards, a folder that contains one of these, or a Hub
        name (see `hub.is_hub_name`), which is downloaded into the cache.
      ema: read the moving average of the weights.
      key: name of the dict, or prefix of the array names, that holds the weights; see
        `nested_checkpoints.select_weights`.
      image_size: resize the position embeddings for images of this size.
      class_names: path of a text file with one class name per line.
      allow_missing, allow_extra: patterns of timm's array names; see `torch_weights.from_torch`.
      **values: hyperparameters, such as heads or mean; the names are the keys of `CONFIG_KEYS`. They override the
        values in the file. None and () are ignored.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the file is refused, or holds no supported model.
      OSError: the model cannot be downloaded; see `hub.download`.
      TypeError: a hyperparameter is unknown.
    """
    origin, path = _locate(path)
    if not path.exists():
        raise FileNotFoundError(_missing(path))
    if unknown := sorted(values.keys() - CONFIG_KEYS.keys()):
        raise TypeError(f'{unknown[0]} is not a hyperparameter: there are {", ".join(CONFIG_KEYS)}')
    path = weight_files.find_weights(path) if path.is_dir() else path
    values = {name: value for name, value in values.items() if value not in (None, ())}
    with weight_files.opened(path) as (tree, metadata):
        configs = weight_files.read_configs(path)
        metadata = run_metadata.with_config(metadata, configs.get(weight_files.CONFIG, {}))
        contents = hyperparameters.CheckpointContents(path, tree, metadata, configs)
        settings, names = run_metadata.from_metadata(metadata)
        names = _choose_class_names(names or weight_files.class_names(contents.config), class_names)
        try:
            selected = checkpoint_layouts.find_weights(tree, ema=ema, key=key)
            name, config = architecture.detect(selected.arrays, default_classes=len(names) or 1000)
            config, preprocessing, selected = hyperparameters.resolve(name, config, selected, contents, values)
            modules = torch_weights.learned_modules(selected.arrays)
            _log_model(path, name, config, modules, selected)
            if len(names) not in (0, config.classes):
                raise ValueError(f'there are {len(names)} names for {config.classes} classes: give --class_names')
            params = torch_weights.from_torch(selected.arrays, config, allow_missing=allow_missing,
                                              allow_extra=allow_extra)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
    weights.check_finite(torch_weights.to_torch(params, config, modules), path)
    params, config = _resize(params, config, image_size)
    own = {'base_model': origin if hub.is_hub_name(origin) else path.name}
    own |= {'reducer.name': modules.reducer.name} if modules.count else {}
    settings = own | settings | run_metadata.plan_settings(selected.training_arguments) | preprocessing
    return PretrainedModel(name, config, params, _metadata(name, config, settings, names))


def to_workdir(src: str | os.PathLike, dst: str | os.PathLike, **options: Any) -> None:
    """Converts the model of another program to a workdir. `--config.init_from` and `evit_jax.predict` accept it.

    Args:
      src: path or Hub name of the model, as in `read_pretrained`.
      dst: path of the folder to create.
      **options: keyword arguments of `read_pretrained`.

    Raises:
      FileNotFoundError: `src` does not exist.
      ValueError: `dst` exists, or `src` is refused.
    """
    _check_paths(src, dst)
    if os.fspath(dst).endswith(('.safetensors', '.pth', '.pt')):
        raise ValueError(f'{dst} is the name of a file, but {src} is converted to a folder: give the name of a new '
                         'folder')
    model = read_pretrained(src, **options)
    with storage.new_folder(dst) as folder:
        weights.save(folder, model.params, model.metadata)
    logging.info('%s is written: start from it with --config.init_from=%s', dst, dst)


def to_safetensors(src: str | os.PathLike, dst: str | os.PathLike, *, ema: bool = False,
                   image_size: int | None = None) -> None:
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
    name, model_config = config['model.name'], config_from_flat(config)
    arrays, metadata = read_newest(src, 'ema' if ema else 'params')
    if not arrays:
        raise ValueError(f'the run in {src} kept no moving average: leave out --ema')
    modules = modules_of(get_reducer(config.get('reducer.name', 'evit')), arrays)
    params = weights.fitted(arrays, torch_weights.template(model_config, modules), src)
    params, model_config = _resize(params, model_config, image_size)
    arrays = torch_weights.to_torch(params, model_config, modules)
    weights.check_finite(arrays, src)
    safetensors_file.write(dst, arrays, run_metadata.to_metadata(name, model_config, config))
    logging.info('%s of step %d written to %s', 'moving average' if ema else 'weights', metadata['next_step'], dst)
    if call := '' if modules.count else run_metadata.timm_call(name, model_config, dst):
        logging.info('in timm: %s', call)
    else:
        logging.warning('timm has no model like %s: the file can only be converted back', name)


def _log_model(path, name, config, modules, selected):
    learned = f', {modules.count} learned modules of {modules.reducer}' if modules.count else ''
    logging.info('%s: %s, images of %d, %d classes%s%s; layout %s; dtype %s', path, name, config.image_size,
                 config.classes, ', distilled' * config.distilled, learned, selected.layout, _dtypes(selected.arrays))
    if config.one_head:
        logging.warning('its distillation token has no head: only the head of the class token gives logits, as in '
                        "Hugging Face's DeiTForImageClassification")


def _dtypes(arrays):
    kinds = sorted({value.dtype.name for value in arrays.values() if value.shape} - {'float32'})  # scalars are counters
    return f'{" and ".join(kinds)} converted to float32' if kinds else 'float32'


def _metadata(name, config, settings, class_names):
    """Returns the metadata of a checkpoint, and logs the config keys that have default values."""
    defaults = run_metadata.default_settings(name, config)
    if assumed := defaults.keys() - settings.keys():
        logging.info('config keys with default values: %s',
                     ', '.join(f'{key} {defaults[key]}' for key in sorted(assumed)))
    model = {f'model.{key}': value for key, value in run_metadata.model_settings(name, config).items()}
    return {'config': _nested(defaults | settings | model)} | ({'class_names': class_names} if class_names else {})


def _choose_class_names(stored, path):
    """Returns the class names in the file at `path`, or the stored names if there is no path."""
    if not path:
        return stored
    try:
        lines = pathlib.Path(path).read_text(encoding='utf-8-sig').rstrip('\n').split('\n')
    except UnicodeDecodeError as error:
        raise ValueError(f'--class_names={path} is not in UTF-8 ({error}): save it as UTF-8') from error
    names = [line.strip() for line in lines]
    if not all(names):
        raise ValueError(f'--class_names={path} has {"an empty line" if any(names) else "no lines"}: give one name a '
                         'line')
    if stored and stored != names:
        logging.warning('--class_names=%s overrides the different class names that are stored with the weights '
                        '(%s ...)', path, stored[0])
    return names


def _resize(params, config, image_size):
    if image_size is None or image_size == config.image_size:
        return params, config
    logging.info('position embeddings resized from images of %d to %d', config.image_size, image_size)
    return torch_weights.resized(params, config, image_size)


def _nested(flat):
    out = {}
    for key, value in flat.items():
        group, _, name = key.rpartition('.')
        (out.setdefault(group, {}) if group else out)[name] = value
    return out


def _locate(path) -> tuple[str, pathlib.Path]:
    """Returns the origin of a model for messages, and its local path. A model of the Hub is downloaded."""
    if hub.is_hub_name(path):
        model = hub.download(path)
        return model.name, model.folder
    return os.fspath(path), pathlib.Path(path).expanduser()


def _check_paths(src, dst):
    if not hub.is_hub_name(src) and not storage.as_path(src).exists():
        raise FileNotFoundError(_missing(src))
    if storage.as_path(dst).exists():
        raise ValueError(f'{dst} exists, and is not overwritten: give another DST')


def _missing(path):
    return f'{path} does not exist: give a file of weights (.pth, .pt, .safetensors), a workdir, or hf-hub:ORG/NAME'
