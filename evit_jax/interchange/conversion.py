"""Converts models of other programs to workdirs, and runs to safetensors files."""

import contextlib
import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import weights, workdir
from evit_jax.checkpoints.loaded import CUSTOM
from evit_jax.checkpoints.manager import read_newest
from evit_jax.interchange import (
    architecture,
    checkpoint_layouts,
    hugging_face_models,
    hyperparameters,
    refusals,
    run_metadata,
    safetensors_file,
    timm_calls,
    timm_models,
    torch_weights,
    weight_files,
)
from evit_jax.interchange.hugging_face_models import size_text
from evit_jax.interchange.hyperparameter_sources import HYPERPARAMETERS
from evit_jax.models import Params, config_from_flat
from evit_jax.models.config import ImageSize, ViTConfig
from evit_jax.reduction.reducer import modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import storage


class PretrainedModel(NamedTuple):
    """A model read from the file of another program."""

    name: str                 # key of `models.CONFIGS`, or 'custom'
    config: ViTConfig
    params: Params            # NumPy arrays, float32
    metadata: dict[str, Any]  # 'config': nested config keys; 'model_config'; 'class_names': list, only if known


def read_pretrained(path: str | os.PathLike, *, ema: bool = False, key: str = '', image_size: ImageSize | None = None,
                    class_names: str | os.PathLike | None = None, allow_missing: Sequence[str] = (),
                    allow_extra: Sequence[str] = (), **values: Any) -> PretrainedModel:
    """Reads a model from a PyTorch or safetensors file, or from a Hugging Face or timm folder. It writes nothing.

    Args:
      path: a file (.pth, .pt, .bin, .safetensors), an index of shards, or a folder that contains one of these.
      ema: read the moving average of the weights.
      key: name of the dict, or prefix of the array names, that holds the weights; see
        `nested_checkpoints.select_weights`.
      image_size: resize the position embeddings for images of this size: a side, or (height, width).
      class_names: path of a text file with one class name per line.
      allow_missing, allow_extra: patterns of timm's array names; see `torch_weights.from_torch`.
      **values: hyperparameters, such as heads or mean; the names are `HYPERPARAMETERS`. They override the values in
        the file. None and () are ignored.

    Raises:
      FileNotFoundError: the path does not exist.
      ValueError: the file is refused, or holds no supported model.
      TypeError: a hyperparameter is unknown.
    """
    path = pathlib.Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(_missing(path))
    if unknown := sorted(values.keys() - {*HYPERPARAMETERS}):
        raise TypeError(f'{unknown[0]} is not a hyperparameter: there are {", ".join(HYPERPARAMETERS)}')
    path = weight_files.find_weights(path) if path.is_dir() else path
    values = {name: value for name, value in values.items() if value not in (None, ())}
    with weight_files.opened(path) as (tree, metadata):
        contents = hyperparameters.CheckpointContents(path, tree, metadata, weight_files.read_configs(path))
        settings, names = run_metadata.from_metadata(metadata)
        names = _choose_class_names(names or weight_files.class_names(contents.config), class_names)
        try:
            selected = _select(contents, ema, key)
            new_head = any(fnmatch.fnmatchcase('head.weight', pattern) for pattern in allow_missing)
            detected = architecture.detect(
                selected.arrays, (len(names) or 1000) if new_head else 0, is_projection=selected.is_projection,
                image_size=_image_size_of_positions(contents, image_size))
            config, preprocessing, selected = hyperparameters.resolve(*detected, selected, contents, values)
            config = _with_stored_values(config, contents)
            name, modules = architecture.name_of(config), torch_weights.learned_modules(selected.arrays)
            _log_model(path, name, config, modules, selected)
            names = _fitting_class_names(names, config, is_flag=class_names is not None)
            params = torch_weights.from_torch(selected.arrays, config, allow_missing=allow_missing,
                                              allow_extra=allow_extra)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
    weights.check_finite(torch_weights.to_torch(params, config, modules), path)
    params, config = _resize(params, config, image_size)
    reducer = {'reducer.name': modules.reducer.name} if modules.count else {}
    settings = reducer | settings | run_metadata.plan_settings(selected.training_arguments) | preprocessing
    return PretrainedModel(name, config, params, _metadata(name, config, settings, names))


def to_workdir(src: str | os.PathLike, dst: str | os.PathLike, **options: Any) -> None:
    """Converts the model of another program to a workdir. `--config.init_from` and `evit_jax.predict` accept it.

    Args:
      src: path of the model, as in `read_pretrained`.
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
    with _new_folder(dst):
        weights.save(dst, model.params, model.metadata)
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
    name, model_config = config.get('model.name', CUSTOM), model_configs.saved_in(config) or config_from_flat(config)
    arrays, metadata = read_newest(src, 'ema' if ema else 'params')
    if not arrays:
        raise ValueError(f'the run in {src} kept no moving average: leave out --ema')
    modules = modules_of(get_reducer(config.get('reducer.name', 'evit')), arrays)
    params = weights.fitted(arrays, torch_weights.template(model_config, modules), src)
    params, model_config = _resize(params, model_config, image_size)
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


def _select(contents, ema, key):
    """Returns the weights of a model in a file, unless its config or name is that of an unsupported model."""
    refusals.check_config(contents.config)
    hugging_face_models.check_model_type(contents.config)
    selected = checkpoint_layouts.find_weights(contents.tree, ema=ema, key=key)
    refusals.check_names([*contents.names, contents.path.name])
    return selected


def _image_size_of_positions(contents, image_size):
    """Returns the image size that a config gives, or the requested size, or None."""
    stored = run_metadata.stored_config(contents.metadata)
    return stored.image_size if stored else hugging_face_models.image_size(contents.config) or image_size


def _with_stored_values(config, contents):
    """Returns the config with the values that only our metadata or a name gives."""
    stored = run_metadata.stored_config(contents.metadata)
    if stored:
        return dataclasses.replace(config, **{key: getattr(stored, key) for key in (
            'projection', 'layer_scale', 'init_std')})
    tag = hugging_face_models.pretrained_tag(contents.config)
    is_projection = any(timm_models.is_projection(f'{name}.{tag}' if tag else name, config.classes)
                        for name in contents.names)
    return dataclasses.replace(config, projection=config.projection or is_projection)


def _fitting_class_names(names, config, is_flag):
    """Returns the class names of a model; [] without classes.

    Raises:
      ValueError: there are names for another number of classes.
    """
    if names and (not config.classes or config.projection):
        if is_flag:
            raise ValueError('--class_names is for a model with a head of classes, and these weights have none: leave '
                             "it out, or give --allow_missing='head.*' for a head to train")
        return []
    if len(names) not in (0, config.classes):
        raise ValueError(f'there are {len(names)} names for {config.classes} classes: give --class_names')
    return names


def _log_model(path, name, config, modules, selected):
    learned = f', {modules.count} learned modules of {modules.reducer}' if modules.count else ''
    outputs = (f'features of {config.head_width} values, as it has no head' if not config.classes else
               f'an embedding of {config.classes} values' if config.projection else f'{config.classes} classes')
    logging.info('%s: %s, images of %s, %s%s%s; layout %s; dtype %s', path, name, size_text(config.image_size), outputs,
                 ', distilled' * config.distilled, learned, selected.layout, _dtypes(selected.arrays))
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
    return {'config': _nested(defaults | settings | model), model_configs.KEY: model_configs.to_json(config)} | (
        {'class_names': class_names} if class_names else {})


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
    logging.info('position embeddings resized from images of %s to %s', size_text(config.image_size),
                 size_text(image_size))
    return torch_weights.resized(params, config, image_size)


def _nested(flat):
    out = {}
    for key, value in flat.items():
        part, _, rest = key.partition('.')
        out.setdefault(part, {})[rest] = value
    return out


def _check_paths(src, dst):
    if not storage.as_path(src).exists():
        raise FileNotFoundError(_missing(src))
    if storage.as_path(dst).exists():
        raise ValueError(f'{dst} exists, and is not overwritten: give another DST')


def _missing(path):
    return f'{path} does not exist: give a file of weights (.pth, .pt, .safetensors), or a workdir'


@contextlib.contextmanager
def _new_folder(path):
    """Creates a folder, and removes it if the body of the `with` block fails, so that the command can be repeated."""
    folder = storage.as_path(path)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        folder.rmtree(missing_ok=True)
        raise
