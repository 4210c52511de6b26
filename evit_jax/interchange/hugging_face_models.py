"""Facts about the model types of transformers, and what their config.json gives."""

from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax.interchange import preprocessing
from evit_jax.interchange.hyperparameter_sources import Hyperparameter, Hyperparameters
from evit_jax.interchange.restricted_pickle import printable
from evit_jax.models.config import ImageSize, ViTConfig, as_hw, as_size, size_text

# Defaults of the classes of transformers. A config.json may omit a value that is the default.
_VIT = {'heads': 12, 'norm_epsilon': 1e-12, 'activation': 'gelu', 'position_resize': 'bicubic'}
_DINOV2 = _VIT | {'norm_epsilon': 1e-6}
_SIGLIP = _VIT | {'norm_epsilon': 1e-6, 'activation': 'gelu_tanh'}
_CLIP = _VIT | {'norm_epsilon': 1e-5, 'activation': 'quick_gelu'}
DEFAULTS: dict[str, dict[str, Any]] = {
    'vit': _VIT, 'deit': _VIT, 'vit_mae': _VIT, 'vit_msn': _VIT | {'norm_epsilon': 1e-6}, 'dinov2': _DINOV2,
    'dinov2_with_registers': _DINOV2 | {'position_resize': 'antialiased'},
    'dinov3_vit': _DINOV2 | {'heads': 6, 'norm_epsilon': 1e-5, 'rope': 'dinov3', 'rope_base': 100.0, 'rope_grid': 0},
    'clip': _CLIP, 'clip_vision_model': _CLIP, 'siglip': _SIGLIP, 'siglip_vision_model': _SIGLIP}
MODEL_TYPES = (*DEFAULTS, 'timm_wrapper')
_PREPROCESSING = {  # model type -> defaults of its image processor
    'vit': preprocessing.HALVES | {'crop': 0.0}, 'dinov3_vit': preprocessing.IMAGENET | {'crop': 0.0},
    **dict.fromkeys(('clip', 'clip_vision_model'), preprocessing.CLIP | {'crop': 1.0}),
    **dict.fromkeys(('siglip', 'siglip_vision_model'), preprocessing.HALVES | {'crop': 0.0}),
    **dict.fromkeys(('deit', 'dinov2', 'dinov2_with_registers'), preprocessing.IMAGENET | {'crop': 0.875})}
_SHAPE_FIELDS = {  # key of config.json -> field of ViTConfig
    'hidden_size': 'width', 'embed_dim': 'width', 'num_features': 'width', 'num_hidden_layers': 'depth',
    'depth': 'depth', 'patch_size': 'patch_size', 'intermediate_size': 'mlp_hidden',
    'num_register_tokens': 'registers', 'reg_tokens': 'registers', 'num_reg_tokens': 'registers',
    'num_classes': 'classes'}


def vision_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of a config.json that describes the vision model: `vision_config` of CLIP and SigLIP."""
    nested = config.get('vision_config')
    if not isinstance(nested, Mapping):
        return config
    labels = {key: config[key] for key in ('architectures', 'id2label') if key in config}
    return {'model_type': config.get('model_type')} | labels | dict(nested)


def check_model_type(config: Mapping[str, Any]) -> None:
    """Raises a ValueError if a config.json has an unsupported model type."""
    model_type = config.get('model_type')
    if model_type is not None and model_type not in MODEL_TYPES:
        raise ValueError(f'its config.json has the model type {printable(str(model_type))}, which is not supported: '
                         f'there are {", ".join(MODEL_TYPES)}')


def likely_type(config: ViTConfig) -> str:
    """Returns the model type that a model with arrays named by transformers has, judged by its architecture."""
    if config.layer_scale:
        of_dinov2 = 'dinov2_with_registers' if config.registers else 'dinov2'
        return of_dinov2 if config.absolute_positions else 'dinov3_vit'
    if config.distilled:
        return 'deit'
    if config.pre_norm:
        return 'clip'
    return 'siglip' if config.pooling == 'map' else 'vit'


def defaults(config: Mapping[str, Any], width: int) -> Hyperparameters:
    """Returns the values of a model type that a config.json may omit; {} without a known model type.

    The number of heads is left out if it does not divide the width.
    """
    model_type = config.get('model_type')
    return {name: Hyperparameter(value, f'the default of {model_type}')
            for name, value in DEFAULTS.get(model_type, {}).items() if name != 'heads' or width % value == 0}


def default_preprocessing(model_type: str) -> Hyperparameters:
    """Returns mean, std and crop of the image processor of a model type; {} if unknown."""
    return {name: Hyperparameter(value, f'as the image processor of {model_type}')
            for name, value in _PREPROCESSING.get(model_type, {}).items()}


def image_size(config: Mapping[str, Any]) -> ImageSize | None:
    """Returns the image size in a config.json of Hugging Face or timm, or None."""
    nested = [config.get(key) for key in ('model_args', 'pretrained_cfg') if isinstance(config.get(key), Mapping)]
    for settings in (config, *nested):
        for key in ('img_size', 'image_size', 'input_size'):
            value = settings.get(key)
            sides = [value, value] if isinstance(value, int) else value[-2:] if isinstance(value, list | tuple) else ()
            if len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
                return as_size(sides)
    return None


def pretrained_tag(config: Mapping[str, Any]) -> str:
    """Returns the tag of timm's pretrained weights in a config.json, such as 'openai'; '' if there is none."""
    nested = config.get('pretrained_cfg')
    tag = nested.get('tag') if isinstance(nested, Mapping) else None
    return tag if isinstance(tag, str) else ''


def warn_of_contradictions(config: Mapping[str, Any], model: ViTConfig) -> None:
    """Logs a warning that lists the values in a config.json that contradict the shapes of the arrays."""
    arguments = config.get('model_args')
    settings = {**arguments, **config} if isinstance(arguments, Mapping) else config
    pairs = [(key, settings.get(key), getattr(model, field)) for key, field in _SHAPE_FIELDS.items()]
    differ = [f'{key} {value}, but the weights have {actual}' for key, value, actual in pairs
              if type(value) is int and value != actual]
    size = image_size(config)
    rounded = size and as_size([side // model.patch_size * model.patch_size for side in as_hw(size)])
    if rounded and rounded != model.image_size:
        differ.append(f'images of {size_text(size)}, but the weights have positions for {size_text(model.image_size)}')
    elif size and size != model.image_size:
        logging.warning('its config.json has images of %s, which are no multiple of the patch size %d: took %s',
                        size_text(size), model.patch_size, size_text(model.image_size))
    if differ:
        logging.warning('its config.json contradicts the shapes of the weights, which take precedence: it has %s. Its '
                        'other values are used, such as the number of heads: if it belongs to another model, move it '
                        'away', '; '.join(differ))
