"""Reads models from files and folders of other programs, and from the Hugging Face Hub."""

import dataclasses
import fnmatch
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import weights
from evit_jax.interchange import (
    architecture,
    checkpoint_layouts,
    hub,
    hugging_face_models,
    hyperparameters,
    refusals,
    run_metadata,
    timm_models,
    torch_weights,
    weight_files,
)
from evit_jax.interchange.hyperparameter_sources import HYPERPARAMETERS
from evit_jax.models import Params
from evit_jax.models.config import ImageSize, ViTConfig, size_text


class PretrainedModel(NamedTuple):
    """A model read from the file of another program."""

    name: str                 # key of `models.CONFIGS`, or 'custom'
    config: ViTConfig
    params: Params            # NumPy arrays, float32
    metadata: dict[str, Any]  # 'config': nested config keys; 'model_config'; 'class_names': list, only if known

    def resized(self, image_size: ImageSize | None) -> 'PretrainedModel':
        """Returns the model with position embeddings for another image size; None: no change."""
        if image_size is None:
            return self
        params, config = torch_weights.resized(self.params, self.config, image_size)
        settings = self.metadata['config']
        settings = settings | {'model': settings['model'] | {'image_size': config.image_size}}
        return self._replace(config=config, params=params, metadata=self.metadata | {
            'config': settings, model_configs.KEY: model_configs.to_json(config)})


def read_pretrained(path: str | os.PathLike, *, ema: bool = False, key: str = '', image_size: ImageSize | None = None,
                    class_names: str | os.PathLike | None = None, allow_missing: Sequence[str] = (),
                    allow_extra: Sequence[str] = (), **values: Any) -> PretrainedModel:
    """Reads a model from a PyTorch or safetensors file, a Hugging Face or timm folder, or the Hugging Face Hub.

    Args:
      path: a file (.pth, .pt, .bin, .safetensors), an index of shards, a folder that contains one of these, or a Hub
        name (see `hub.is_hub_name`), which is downloaded into the cache.
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
      OSError: the model cannot be downloaded; see `hub.download`.
      TypeError: a hyperparameter is unknown.
    """
    origin, path = locate(path)
    if not path.exists():
        raise FileNotFoundError(missing_file(path))
    if unknown := sorted(values.keys() - {*HYPERPARAMETERS}):
        raise TypeError(f'{unknown[0]} is not a hyperparameter: there are {", ".join(HYPERPARAMETERS)}')
    path = weight_files.find_weights(path) if path.is_dir() else path
    values = {name: value for name, value in values.items() if value not in (None, ())}
    with weight_files.opened(path) as (tree, metadata):
        configs = weight_files.read_configs(path)
        metadata = run_metadata.with_config(metadata, configs.get(weight_files.CONFIG, {}))
        contents = hyperparameters.CheckpointContents(path, tree, metadata, configs)
        stored = run_metadata.from_metadata(metadata)[1] or weight_files.class_names(contents.config)
        names = _choose_class_names(stored, class_names)
        try:
            selected = _select(contents, ema, key)
            new_head = any(fnmatch.fnmatchcase('head.weight', pattern) for pattern in allow_missing)
            detected = architecture.detect(
                selected.arrays, (len(names) or 1000) if new_head else 0, is_projection=selected.is_projection,
                image_size=_image_size_of_positions(contents, image_size))
            config, settings, selected = hyperparameters.resolve(*detected, selected, contents, values)
            config = _with_stored_values(config, contents)
            _log_model(path, config, selected)
            names = _fitting_class_names(names, config, is_flag=class_names is not None)
            params = torch_weights.from_torch(selected.arrays, config, allow_missing=allow_missing,
                                              allow_extra=allow_extra)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from error
    modules = torch_weights.learned_modules(selected.arrays)
    weights.check_finite(torch_weights.to_torch(params, config, modules), path)
    own = {'base_model': origin if hub.is_hub_name(origin) else path.name}
    own |= {'reducer.name': modules.reducer.name} if modules.count else {}
    settings = own | run_metadata.from_metadata(metadata)[0] | run_metadata.plan_settings(
        selected.training_arguments) | settings
    name = architecture.name_of(config)
    return PretrainedModel(name, config, params, _metadata(name, config, settings, names)).resized(image_size)


def locate(path: str | os.PathLike) -> tuple[str, pathlib.Path]:
    """Returns the origin of a model, a path or a Hub name with its commit, and the local path of its files."""
    if hub.is_hub_name(path):
        model = hub.download(path)
        return model.name, model.folder
    return os.fspath(path), pathlib.Path(path).expanduser()


def missing_file(path: Any) -> str:
    """Returns the message for a path that does not exist."""
    return f'{path} does not exist: give a file of weights (.pth, .pt, .safetensors), a workdir, or hf-hub:ORG/NAME'


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
    if names and not config.has_classes:
        if is_flag:
            raise ValueError('--class_names is for a model with a head of classes, and these weights have none: leave '
                             "it out, or give --allow_missing='head.*' for a head to train")
        return []
    if len(names) not in (0, config.classes):
        raise ValueError(f'there are {len(names)} names for {config.classes} classes: convert the weights with '
                         '--class_names=FILE, or correct the names in config.json')
    return names


def _log_model(path, config, selected):
    modules = torch_weights.learned_modules(selected.arrays)
    learned = f', {modules.count} learned modules of {modules.reducer}' if modules.count else ''
    outputs = (f'features of {config.head_width} values, as it has no head' if not config.classes else
               f'an embedding of {config.classes} values' if config.projection else f'{config.classes} classes')
    logging.info('%s: %s, images of %s, %s%s%s; layout %s; dtype %s', path, architecture.name_of(config),
                 size_text(config.image_size), outputs, ', distilled' * config.distilled, learned, selected.layout,
                 _dtypes(selected.arrays))
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


def _nested(flat):
    out = {}
    for key, value in flat.items():
        group, _, name = key.rpartition('.')
        (out.setdefault(group, {}) if group else out)[name] = value
    return out
