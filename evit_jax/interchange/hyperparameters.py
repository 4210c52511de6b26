"""Resolves the hyperparameters of a model: heads, epsilon, activation, pooling and preprocessing.

They cannot be inferred from array shapes. Precedence: command-line flags, settings in the file, configs in the same
folder, names of the model. A value that none of these sources gives is assumed, with a warning.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax.interchange import checkpoint_layouts, run_metadata, weight_files
from evit_jax.interchange import hyperparameter_sources as sources
from evit_jax.interchange.checkpoint_layouts import ModelWeights
from evit_jax.interchange.hyperparameter_sources import CONFIG_KEYS, Hyperparameter, Hyperparameters
from evit_jax.models.config import POOLINGS, ViTConfig
from evit_jax.models.layers import ACTIVATIONS

_MODEL_TYPES = ('vit', 'deit', 'vit_msn', 'vit_mae', 'timm_wrapper')  # model types with the forward pass of our ViT
_MODEL_FIELDS = ('heads', 'norm_epsilon', 'activation', 'pooling')
_SHAPE_FIELDS = {  # key of config.json -> field of ViTConfig
    'hidden_size': 'width', 'embed_dim': 'width', 'num_features': 'width', 'num_hidden_layers': 'depth',
    'depth': 'depth', 'patch_size': 'patch_size', 'image_size': 'image_size'}
_RUN_KEYS = {'crop': 'crop_pct', 'heads': 'num_heads'}  # hyperparameter -> key that `sources.in_settings` looks up


class CheckpointContents(NamedTuple):
    """Contents of a file and its folder, except the selected arrays."""

    path: pathlib.Path
    tree: Any                   # contents of the file: weights and settings
    metadata: Mapping[str, str]               # metadata of a safetensors file
    configs: Mapping[str, Mapping[str, Any]]  # file name -> content, for the configs in the same folder

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of Hugging Face or timm; {} if there is none."""
        return self.configs.get(weight_files.CONFIG, {})


def resolve(name: str, config: ViTConfig, weights: ModelWeights, contents: CheckpointContents,
            flags: Mapping[str, Any]) -> tuple[ViTConfig, dict[str, Any], ModelWeights]:
    """Completes a detected config, and logs the source of each value. One warning lists the assumed values.

    Args:
      name, config: name and config of the model, detected from the shapes of the arrays.
      weights: the arrays of the model.
      contents: the other contents of the file and its folder.
      flags: hyperparameter -> value from the command line. Flags take precedence over all sources.

    Returns:
      The config with all values, the config keys of the preprocessing, and the weights. If the head reads the class
      token and the weights have `fc_norm` but no `norm`, `fc_norm` is renamed to `norm`.

    Raises:
      ValueError: a value is unsupported or out of range, or config.json describes another model.
    """
    _check_config(contents.config, config)
    names = _model_names(contents)
    known = _with_flags(_read_sources(config, weights, contents, names), flags)
    known, weights = _resolve_pooling(known, weights)
    assumed = _defaults(name, config, weights, names, contents)
    assumed = {key: value for key, value in assumed.items() if key not in known}
    _check_values(known)
    _log_values(contents.path, known, assumed)
    _warn_of_resampling(contents)
    values = {key: value for key, (value, _) in (assumed | known).items()}
    config = dataclasses.replace(config, **{key: values.pop(key) for key in _MODEL_FIELDS})
    return config, {CONFIG_KEYS[key]: value for key, value in values.items()}, weights


def _log_values(path, known, assumed):
    if known:
        logging.info('%s: %s', path, _formatted(known))
    if assumed:
        logging.warning('%s: nothing gives these values, so they are assumed: %s. If the model was trained with other '
                        'values, every result is wrong: give %s', path, _formatted(assumed),
                        ', '.join(f'--{key}' for key in assumed))


def _warn_of_resampling(contents):
    preprocessor = contents.configs.get(weight_files.PREPROCESSOR, {})
    resampling = sources.resampling_filter(preprocessor, contents.config)
    if resampling not in ('', 'bicubic'):
        logging.warning('%s: its images were resized by the filter %s; this project resizes by bicubic, so that '
                        'results differ a little', contents.path, resampling)


def _model_names(contents):
    """Returns the names of the model in the file, in config.json and in the metadata."""
    metadata = sources.parsed_metadata(contents.metadata)
    return [name for settings in (contents.tree, contents.config, metadata) for name in sources.model_names(settings)]


def _read_sources(config, weights, contents, names) -> Hyperparameters:
    """Merges the values of all sources. The first source of a value takes precedence; contradictions are logged."""
    known: Hyperparameters = {}
    for source in _stored_sources(config, contents):
        for key, new in source.items():
            old = known.setdefault(key, new)
            if old.value != new.value:
                logging.warning('%s: %s is %s (%s), but %s (%s): took the first; --%s decides', contents.path, key,
                                _text(old.value), old.source, _text(new.value), new.source, key)
    model_type = contents.config.get('model_type')
    by_name = sources.of_model_names(names, config.width)
    if by_name and 'fc_norm.weight' not in weights.arrays:
        by_name['pooling'] = Hyperparameter('token', by_name['heads'].source)
    is_hugging_face = weights.layout == checkpoint_layouts.HUGGING_FACE
    for source in (
            sources.of_model_type(model_type) if model_type in _MODEL_TYPES[:-1] else {},
            {'pooling': Hyperparameter('token', "Hugging Face's classifiers")} if is_hugging_face else {},
            by_name, sources.of_moco_path(weights.path, config.width)):
        known = source | known
    return known


def _stored_sources(config, contents) -> list[Hyperparameters]:
    """Reads metadata, settings in the file and configs in the same folder, ordered by precedence."""
    run, _ = run_metadata.from_metadata(contents.metadata)
    own = {key: run[config_key] for key, config_key in CONFIG_KEYS.items() if config_key in run}
    if run_metadata.METADATA in contents.metadata:  # a key missing in our metadata has the value of the named model
        own = {key: getattr(config, key) for key in _MODEL_FIELDS} | own
    metadata = {key: value for key, value in sources.parsed_metadata(contents.metadata).items()
                if key != run_metadata.METADATA}
    preprocessor = contents.configs.get(weight_files.PREPROCESSOR)
    return [sources.in_settings({_RUN_KEYS.get(key, key): value for key, value in own.items()}, 'its metadata'),
            sources.in_settings(contents.tree, 'the file'),
            sources.of_preprocessor(preprocessor, weight_files.PREPROCESSOR) if preprocessor else {},
            sources.in_settings(contents.config, weight_files.CONFIG),
            sources.in_settings(metadata, 'its metadata')]


def _with_flags(known, flags):
    for key, value in flags.items():
        value = tuple(value) if isinstance(value, list | tuple) else value
        if key in known and known[key].value != value:
            logging.warning('--%s=%s overrides %s (%s)', key, _text(value), _text(known[key].value), known[key].source)
        known = known | {key: Hyperparameter(value, f'--{key}')}
    return known


def _resolve_pooling(known, weights):
    """Chooses the pooling that matches the norms of the weights.

    If `fc_norm` exists without `norm`, it belongs to mean pooling, or it is the last norm of a model whose head reads
    the class token.
    """
    only_fc_norm = 'fc_norm.weight' in weights.arrays and 'norm.weight' not in weights.arrays
    pooling, source = known.get('pooling', Hyperparameter('avg' if only_fc_norm else None, 'fc_norm in place of norm'))
    if only_fc_norm and pooling == 'avg':
        known = known | {'pooling': Hyperparameter('avg_fc_norm', source)}
    elif only_fc_norm and pooling == 'token':
        weights = weights._replace(arrays={key.removeprefix('fc_') if key.startswith('fc_norm.') else key: value
                                           for key, value in weights.arrays.items()})
    elif pooling == 'avg_fc_norm' and not only_fc_norm:
        raise ValueError(f'pooling=avg_fc_norm ({source}) is for weights with fc_norm in place of norm; these have '
                         f'{"both" if "fc_norm.weight" in weights.arrays else "norm"}: give --pooling=avg or '
                         '--pooling=token')
    return known, weights


def _defaults(name, config, weights, names, contents) -> Hyperparameters:
    """Returns the value of every hyperparameter that is assumed if no source gives one."""
    settings = run_metadata.default_settings(name, config)
    origin = 'as its authors' if name.startswith('lvvit') else 'as DeiT'
    defaults = {key: Hyperparameter(settings[config_key], origin) for key, config_key in CONFIG_KEYS.items()
                if config_key in settings}
    defaults |= {key: Hyperparameter(getattr(config, key), f'as {name}') for key in _MODEL_FIELDS}
    is_hugging_face = weights.layout == checkpoint_layouts.HUGGING_FACE
    if is_hugging_face:
        defaults['norm_epsilon'] = Hyperparameter(1e-12, "as Hugging Face's ViT")
    arch = contents.tree.get('arch') if isinstance(contents.tree, Mapping) else None
    defaults |= sources.of_moco_arch(arch, config.width)
    if name.startswith('deit'):
        defaults |= sources.of_model_family([*names, contents.path.name])
    model_type = contents.config.get('model_type', 'vit' if is_hugging_face and not config.distilled else '')
    if model_type == 'vit':  # defaults of its image processor
        defaults |= {key: Hyperparameter(value, "as Hugging Face's ViT")
                     for key, value in (sources.HALVES | {'crop': 0.0}).items()}
    return defaults


def _check_values(known):
    """Raises a ValueError if a value is unsupported or out of range."""
    for key, supported in (('activation', ACTIVATIONS), ('pooling', POOLINGS)):
        if key in known and known[key].value not in supported:
            raise ValueError(f'{key}={known[key].value} ({known[key].source}) is not supported: there are '
                             f'{", ".join(supported)}; if it is wrong, give --{key}')
    for key in [key for key in ('mean', 'std', 'crop') if key in known]:
        value, source = known[key]
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(0 <= number <= 1 for number in numbers) or (key == 'std' and 0 in numbers):
            scale = '' if key == 'crop' else 'pixels are in 0..1, so divide values of 0..255 by 255 and '
            raise ValueError(f'{key}={_text(value)} ({source}) is outside {"(" if key == "std" else "["}0, 1]: '
                             f'{scale}give --{key}')


def _check_config(hub_config, config):
    """Raises a ValueError if config.json does not describe the model of the weights."""
    model_type = hub_config.get('model_type')
    if model_type is not None and model_type not in _MODEL_TYPES:
        raise ValueError(f'its {weight_files.CONFIG} has the model type {model_type}, which is not supported: there '
                         f'are {", ".join(_MODEL_TYPES)}')
    for key, field in _SHAPE_FIELDS.items():
        value = hub_config.get(key)
        if type(value) is int and value != getattr(config, field):
            raise ValueError(f'its {weight_files.CONFIG} has {key}={value}, but the weights have '
                             f'{getattr(config, field)}: it is of another model: move it away, or give the one that '
                             'belongs to them')


def _formatted(hyperparameters):
    return ', '.join(f'{key} {_text(value)} ({source})' for key, (value, source) in sorted(hyperparameters.items()))


def _text(value):
    return ','.join(f'{number:g}' for number in value) if isinstance(value, tuple) else (
        f'{value:g}' if isinstance(value, float) else str(value))
