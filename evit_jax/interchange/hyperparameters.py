"""Resolves the hyperparameters of a model: heads, epsilon, activation, pooling, rotary positions and preprocessing.

They cannot be inferred from array shapes. Precedence: command-line flags, settings in the file, configs in the same
folder, names of the model. A value that none of these sources gives is assumed, with a warning.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax.data.transforms.geometry import FILTERS
from evit_jax.interchange import (
    hugging_face_models,
    preprocessing,
    refusals,
    run_metadata,
    timm_models,
    weight_files,
)
from evit_jax.interchange import hyperparameter_sources as sources
from evit_jax.interchange.checkpoint_layouts import HUGGING_FACE, ModelWeights
from evit_jax.interchange.hyperparameter_sources import MODEL_FIELDS, PREPROCESSING, Hyperparameter, Hyperparameters
from evit_jax.interchange.names_timm import DINOV2, EVA
from evit_jax.interchange.restricted_pickle import printable
from evit_jax.kernels.activations import ACTIVATIONS
from evit_jax.models import CONFIGS
from evit_jax.models.config import POOLINGS, ROPES, ViTConfig
from evit_jax.models.positions import POSITION_RESIZES

_RUN_KEYS = {'crop': 'crop_pct', 'heads': 'num_heads'}  # hyperparameter -> key that `sources.in_settings` looks up
_ROPE_FIELDS = ('rope', 'rope_base', 'rope_grid')


class CheckpointContents(NamedTuple):
    """Contents of a file and its folder, except the selected arrays."""

    path: pathlib.Path
    tree: Any                   # contents of the file: weights and settings
    metadata: Mapping[str, str]               # metadata of a safetensors file
    configs: Mapping[str, Mapping[str, Any]]  # file name -> content, for the configs in the same folder

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.json of Hugging Face or timm, for a CLIP its part for the vision model; {} if there is none."""
        return hugging_face_models.vision_config(self.configs.get(weight_files.CONFIG, {}))

    @property
    def names(self) -> list[str]:
        """The names of the model in the file, in config.json and in the metadata."""
        metadata = sources.parsed_metadata(self.metadata)
        return [name for settings in (self.tree, self.config, metadata) for name in sources.model_names(settings)]


def resolve(name: str, config: ViTConfig, weights: ModelWeights, contents: CheckpointContents,
            flags: Mapping[str, Any]) -> tuple[ViTConfig, dict[str, Any], ModelWeights]:
    """Completes a detected config, and logs the source of each value. One warning lists the assumed values.

    Args:
      name, config: name and config of the model, detected from the shapes of the arrays.
      weights: the arrays of the model.
      contents: the other contents of the file and its folder.
      flags: hyperparameter -> value from the command line. Flags take precedence over all sources.

    Returns:
      The config with all values, the config keys of the preprocessing, and the weights that the model uses. If the head
      reads the class token and the weights have `fc_norm` but no `norm`, `fc_norm` is renamed to `norm`.

    Raises:
      ValueError: a value is unsupported or out of range.
    """
    hugging_face_models.warn_of_contradictions(contents.config, config)
    known = _with_flags(_read_sources(config, weights, contents), flags)
    known, weights = _resolve_pooling(known, config, weights)
    assumed = _defaults(name, config, weights, contents) | _usual_rope(config, weights.layout, known)
    if not known.get('rope', assumed.get('rope', Hyperparameter('', ''))).value:
        known = {key: value for key, value in known.items() if key not in _ROPE_FIELDS}
        assumed = {key: value for key, value in assumed.items() if key not in _ROPE_FIELDS}
    assumed = {key: value for key, value in assumed.items() if key not in known}
    _check_values(known, config.width)
    _log_values(contents.path, known, assumed)
    refusals.warn_of_twin(config, weights.layout == EVA)
    values = {key: value for key, (value, _) in (assumed | known).items()}
    config = dataclasses.replace(config, **{key: values.pop(key) for key in MODEL_FIELDS if key in values})
    settings = {PREPROCESSING[key]: value for key, value in values.items()}
    return config, settings | _interpolation(contents), weights


def _log_values(path, known, assumed):
    if known:
        logging.info('%s: %s', path, _formatted(known))
    if assumed:
        logging.warning('%s: nothing gives these values, so they are assumed: %s. If the model was trained with other '
                        'values, every result is wrong: give %s', path, _formatted(assumed),
                        ', '.join(f'--{key}' for key in assumed))


def _interpolation(contents):
    """Returns the config key of the filter that resizes images, if a config gives it."""
    preprocessor = contents.configs.get(weight_files.PREPROCESSOR, {})
    resampling = preprocessing.resampling_filter(preprocessor, contents.config)
    if resampling in FILTERS:
        return {'data.interpolation': resampling}
    if resampling:
        logging.warning('%s: its images were resized by the filter %s, which is unknown: took bicubic', contents.path,
                        printable(resampling))
    return {}


def _read_sources(config, weights, contents) -> Hyperparameters:
    """Merges the values of all sources. The first source of a value takes precedence; contradictions are logged."""
    known: Hyperparameters = {}
    for source in _stored_sources(config, contents):
        for key, new in source.items():
            old = known.setdefault(key, new)
            if old.value != new.value:
                logging.warning('%s: %s is %s (%s), but %s (%s): took the first; --%s decides', contents.path, key,
                                _text(old.value), old.source, _text(new.value), new.source, key)
    model_type = contents.config.get('model_type')
    if config.swiglu and model_type != 'dinov3_vit':
        known['activation'] = Hyperparameter('silu', 'the activation of gated MLPs')
    by_name = _by_names(contents.names, config, weights)
    is_hugging_face = weights.layout == HUGGING_FACE
    pooling = {'pooling': Hyperparameter('token' if config.class_token else 'avg', "Hugging Face's classes")}
    of_model_type = hugging_face_models.defaults(contents.config, config.width)
    for source in (of_model_type, pooling if is_hugging_face else {}, by_name,
                   {'position_resize': _position_resize(weights, contents)},
                   sources.of_moco_path(weights.path, config.width)):
        known = source | known
    return known


def _stored_sources(config, contents) -> list[Hyperparameters]:
    """Reads metadata, settings in the file and configs in the same folder, ordered by precedence."""
    run, _ = run_metadata.from_metadata(contents.metadata)
    stored = run_metadata.stored_config(contents.metadata)
    own = {key: getattr(stored, key) for key in MODEL_FIELDS} if stored else {}
    own |= {key: run[config_key] for key, config_key in PREPROCESSING.items() if config_key in run}
    metadata = {key: value for key, value in sources.parsed_metadata(contents.metadata).items()
                if key != run_metadata.METADATA}
    preprocessor = contents.configs.get(weight_files.PREPROCESSOR)
    return [sources.in_settings({_RUN_KEYS.get(key, key): value for key, value in own.items()}, 'its metadata'),
            sources.in_settings(contents.tree, 'the file'),
            preprocessing.of_preprocessor(preprocessor, weight_files.PREPROCESSOR) if preprocessor else {},
            sources.in_settings(contents.config, weight_files.CONFIG),
            sources.in_settings(metadata, 'its metadata')]


def _by_names(names, config, weights) -> Hyperparameters:
    """Returns the values of the first name that is a model of timm or DeiT; {} if there is none."""
    for name in names:
        if facts := timm_models.facts(name, config):
            if 'pooling' not in facts and 'fc_norm.weight' not in weights.arrays:
                facts['pooling'] = 'token' if config.class_token else 'avg'
            return {key: Hyperparameter(value, f'the name {name}') for key, value in facts.items()}
    return {}


def _position_resize(weights, contents) -> Hyperparameter:
    """Returns how the program of the weights resizes position embeddings."""
    if weights.layout == DINOV2:  # DINOv2's models with registers are resized with antialias
        return Hyperparameter('antialiased' if 'reg_token' in weights.arrays else 'dinov2', "as DINOv2's code")
    names = [*contents.names, contents.path.name]
    of_timm = 'architecture' in contents.config or 'architecture' in contents.metadata or any(
        timm_models.is_timm_name(name) and not name.startswith('deit_') for name in names)
    if weights.layout == EVA or (of_timm and weights.layout != HUGGING_FACE):
        return Hyperparameter('antialiased', 'as timm')
    return Hyperparameter('bicubic', "as DeiT's code and Hugging Face")


def _with_flags(known, flags):
    for key, value in flags.items():
        value = tuple(value) if isinstance(value, list | tuple) else value
        if key in known and known[key].value != value:
            logging.warning('--%s=%s overrides %s (%s)', key, _text(value), _text(known[key].value), known[key].source)
        known = known | {key: Hyperparameter(value, f'--{key}')}
    return known


def _resolve_pooling(known, config, weights):
    """Chooses the pooling that matches the arrays.

    If `fc_norm` exists without `norm`, it belongs to mean pooling, or it is the last norm of a model whose head reads
    the class token.
    """
    arrays, is_flag = weights.arrays, known.get('pooling', Hyperparameter('', '')).source == '--pooling'
    if config.pooling == 'map' and weights.layout == HUGGING_FACE and 'head.weight' in arrays:
        logging.info("left out attn_pool.*: the head of Hugging Face's SiglipForImageClassification reads the mean of "
                     'the patch tokens')
        arrays = {key: value for key, value in arrays.items() if not key.startswith('attn_pool.')}
        return known | {'pooling': Hyperparameter('avg', 'its classifier')}, weights._replace(arrays=arrays)
    if config.pooling in ('map', 'token_avg') and not is_flag:
        source = 'the arrays attn_pool.*' if config.pooling == 'map' else 'the shape of head.weight'
        return known | {'pooling': Hyperparameter(config.pooling, source)}, weights
    only_fc_norm = 'fc_norm.weight' in arrays and 'norm.weight' not in arrays
    pooling, source = known.get('pooling', Hyperparameter('avg' if only_fc_norm else None, 'fc_norm in place of norm'))
    if pooling == 'map' or (pooling == 'token_avg' and config.classes):
        wanted = 'with attn_pool.*' if pooling == 'map' else f'whose head has {2 * config.width} inputs'
        raise ValueError(f'pooling={pooling} ({source}) is for weights {wanted}, which these are not: if it is wrong, '
                         'give --pooling')
    if only_fc_norm and pooling == 'avg':
        known = known | {'pooling': Hyperparameter('avg_fc_norm', source)}
    elif only_fc_norm and pooling == 'token':
        weights = weights._replace(arrays={key.removeprefix('fc_') if key.startswith('fc_norm.') else key: value
                                           for key, value in arrays.items()})
    elif pooling == 'avg_fc_norm' and not only_fc_norm:
        raise ValueError(f'pooling=avg_fc_norm ({source}) is for weights with fc_norm in place of norm; these have '
                         f'{"both" if "fc_norm.weight" in arrays else "norm"}: give --pooling=avg or --pooling=token')
    return known, weights


def _usual_rope(config, layout, known) -> Hyperparameters:
    """Returns the rotary positions of the models with these arrays, to be assumed if no source gives them.

    Raises:
      ValueError: a model has no positions, or those of models that are not supported.
    """
    is_pe = config.pre_norm and config.pooling == 'map'
    if is_pe or (layout == EVA and config.layer_scale and config.qkv_bias and config.k_bias):
        name = 'vit_pe_*' if is_pe else 'vit_*_rope_*'
        raise ValueError(f'it has the arrays of {name} of timm, whose rotary positions count columns before rows, '
                         'which no model here does: give another model')
    usual, origin = {}, ''
    if layout == EVA and (config.swiglu or not config.class_token):
        usual, origin = {'rope': 'eva', 'rope_base': 10000.0, 'rope_grid': 16}, "as timm's EVA-02"
    elif not config.absolute_positions and (config.registers or layout == HUGGING_FACE):
        usual, origin = {'rope': 'dinov3', 'rope_base': 100.0, 'rope_grid': 0}, 'as DINOv3'
    if not config.absolute_positions and not usual and not known.get('rope', Hyperparameter('', '')).value:
        raise ValueError('it has no position embeddings, so that its positions must be rotary, and nothing gives '
                         f'their kind: give --rope={" or --rope=".join(filter(None, ROPES))}')
    return {key: Hyperparameter(value, origin) for key, value in usual.items()}


def _defaults(name, config, weights, contents) -> Hyperparameters:
    """Returns the value of every hyperparameter that is assumed if no source gives one."""
    settings = run_metadata.default_settings(name, config)
    origin = 'as its authors' if name.startswith('lvvit') else 'as DeiT'
    defaults = {key: Hyperparameter(settings[config_key], origin) for key, config_key in PREPROCESSING.items()
                if config_key in settings}
    defaults |= {key: Hyperparameter(getattr(config, key), f'as {name}' if name in CONFIGS else 'as usual')
                 for key in ('heads', 'norm_epsilon', 'activation', 'pooling')}
    likely_type = hugging_face_models.likely_type(config) if weights.layout == HUGGING_FACE else ''
    defaults |= {key: Hyperparameter(value, f"as Hugging Face's {likely_type}")
                 for key, value in hugging_face_models.DEFAULTS.get(likely_type, {}).items()
                 if key in ('norm_epsilon', 'activation')}
    if name.startswith('lvvit'):
        return defaults
    defaults |= {key: value._replace(source=f'by {value.source}')
                 for key, value in _by_names([contents.path.name], config, weights).items()}
    arch = contents.tree.get('arch') if isinstance(contents.tree, Mapping) else None
    defaults |= sources.of_moco_arch(arch, config.width)
    defaults |= preprocessing.of_model_family([*contents.names, contents.path.name])
    return defaults | hugging_face_models.default_preprocessing(contents.config.get('model_type') or likely_type)


def _check_values(known, width):
    """Raises a ValueError if a value is unsupported or out of range."""
    heads, source = known.get('heads', Hyperparameter(1, ''))
    if heads < 1 or width % heads:
        raise ValueError(f'heads={heads} ({source}) does not divide the width of {width}: give --heads')
    for key, supported in (('activation', ACTIVATIONS), ('pooling', POOLINGS), ('rope', ROPES),
                           ('position_resize', POSITION_RESIZES)):
        if key in known and known[key].value not in supported:
            raise ValueError(f'{key}={known[key].value} ({known[key].source}) is not supported: there are '
                             f'{", ".join(filter(None, supported))}; if it is wrong, give --{key}')
    for key in [key for key in PREPROCESSING if key in known]:
        value, source = known[key]
        numbers = value if isinstance(value, tuple) else (value,)
        if not all(0 <= number <= 1 for number in numbers) or (key == 'std' and 0 in numbers):
            scale = '' if key == 'crop' else 'pixels are in 0..1, so divide values of 0..255 by 255 and '
            raise ValueError(f'{key}={_text(value)} ({source}) is outside {"(" if key == "std" else "["}0, 1]: '
                             f'{scale}give --{key}')


def _formatted(hyperparameters):
    return ', '.join(f'{key} {_text(value)} ({source})' for key, (value, source) in sorted(hyperparameters.items()))


def _text(value):
    return ','.join(f'{number:g}' for number in value) if isinstance(value, tuple) else (
        f'{value:g}' if isinstance(value, float) else str(value))
