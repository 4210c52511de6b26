"""Reads hyperparameters from settings, configs and names.

A hyperparameter changes the logits but cannot be inferred from array shapes, such as the number of heads. Each function
reads one kind of source. `hyperparameters.resolve` applies their precedence.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from evit_jax.interchange.restricted_pickle import InertObject, printable

CONFIG_KEYS = {  # hyperparameter -> key of a run's config
    'heads': 'model.heads', 'norm_epsilon': 'model.norm_epsilon', 'activation': 'model.activation',
    'pooling': 'model.pooling', 'mean': 'data.mean', 'std': 'data.std', 'crop': 'data.eval_crop'}
_ACTIVATIONS = {'gelu': ('gelu', 'nn.gelu', 'torch.nn.gelu', 'gelu_python'), 'quick_gelu': ('quick_gelu', 'quickgelu'),
                'gelu_tanh': ('gelu_tanh', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'gelu_accurate')}
_POOLINGS = {'token': ('token', 'cls', 'cls_token', 'false'), 'avg': ('avg', 'mean', 'gap', 'true'),
             'avg_fc_norm': ('avg_fc_norm',)}
_NESTED = ('pretrained_cfg', 'model_args', 'model_kwargs', 'args', 'hyper_parameters', 'hparams', 'config', 'cfg',
           'model_config', 'model', 'backbone')
# Dicts whose names match describe class labels, other models, or parts without attention.
_UNRELATED = re.compile('label|class|idx|index|vocab|decoder|teacher|student|predictor|head|neck|text|loss|optim|sched')
_NAMES = ('architecture', 'arch', 'model', 'model_name', 'model_arch', 'backbone')
_MAX_DEPTH = 4
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALVES = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
_IMAGENET_TAGS = ('dino', 'mae', 'moco', 'ibot')  # tags of timm's vit_* that use ImageNet's mean and std
_FILTERS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')  # Pillow's resampling filters by number
_HEADS = {'tiny': 3, 'small': 6, 'base': 12}  # size in a model name of timm or DeiT -> number of heads
_MOCO_WIDTHS = {'vit_small': 384, 'vit_base': 768}


class Hyperparameter(NamedTuple):
    """A value, and a description of its source for messages."""

    value: Any
    source: str


Hyperparameters = dict[str, Hyperparameter]  # has a subset of the keys of CONFIG_KEYS


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None  # the bound excludes NaN and infinity


def _count(value):
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _channels(value):
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    numbers = tuple(map(_number, value))
    return None if None in numbers else numbers


def _one_of(names):
    """Returns a reader of text or bool. It returns the name whose synonyms include the value, or the value itself."""

    def read(value):
        if not isinstance(value, str | bool) or value == '':
            return None
        word = str(value).lower()
        return next((name for name, synonyms in names.items() if word in synonyms), printable(str(value)))

    return read


# hyperparameter -> (keys in settings by precedence, reader). A reader returns None for a value of another type.
_READERS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    'heads': (('num_heads', 'num_attention_heads', 'n_heads', 'heads'), _count),
    'norm_epsilon': (('layer_norm_eps', 'norm_epsilon', 'norm_eps', 'layer_norm_epsilon', 'ln_eps'), _number),
    'activation': (('hidden_act', 'act_layer', 'activation'),
                   lambda value: _one_of(_ACTIVATIONS)(value) if isinstance(value, str) else None),
    'pooling': (('global_pool', 'pooling', 'gp'), _one_of(_POOLINGS)),  # MAE stores True or False
    'mean': (('image_mean', 'mean'), _channels), 'std': (('image_std', 'std'), _channels),
    'crop': (('crop_pct', 'eval_crop', 'eval_crop_ratio'), _number)}


def in_settings(settings: Any, source: str, depth: int = 0, visited: set[int] | None = None) -> Hyperparameters:
    """Searches nested dicts of settings. An outer dict takes precedence over the dicts inside it.

    Nested dicts whose names are not in `_NESTED` have the lowest precedence. A value in several of them is ignored if
    they contradict each other.
    """
    settings = settings.state if isinstance(settings, InertObject) else settings
    visited = set() if visited is None else visited
    if not isinstance(settings, Mapping) or depth > _MAX_DEPTH or id(settings) in visited:
        return {}
    visited.add(id(settings))
    result = {}
    for name, (keys, read) in _READERS.items():
        values = [Hyperparameter(read(settings[key]), f'{key} of {source}') for key in keys if key in settings]
        if valid := [value for value in values if value.value is not None]:
            result[name] = valid[0]
    if str(settings.get('crop_mode')) == 'squash':
        result['crop'] = Hyperparameter(0.0, f'crop_mode of {source}')
    others = [key for key in settings if isinstance(key, str) and key not in _NESTED
              and not _UNRELATED.search(key.lower())]
    usual, unusual = ([in_settings(settings[key], f'{printable(key)} {"of" if depth else "in"} {source}', depth + 1,
                                   visited) for key in keys if key in settings] for keys in (_NESTED, others))
    for nested in [*usual, _without_contradictions(unusual)]:
        result = nested | result
    return result


def _without_contradictions(several: list[Hyperparameters]) -> Hyperparameters:
    """Merges the hyperparameters of several dicts, and drops those whose values differ."""
    values: dict[str, list[Hyperparameter]] = {}
    for hyperparameters in several:
        for name, value in hyperparameters.items():
            values.setdefault(name, []).append(value)
    return {name: same[0] for name, same in values.items() if len({value for value, _ in same}) == 1}


def model_names(settings: Any, depth: int = 0) -> list[str]:
    """Returns the names of models in nested dicts of settings."""
    settings = settings.state if isinstance(settings, InertObject) else settings
    if not isinstance(settings, Mapping) or depth > _MAX_DEPTH:
        return []
    names = [settings[key] for key in _NAMES if isinstance(settings.get(key), str)]
    return names + [name for key in _NESTED for name in model_names(settings.get(key), depth + 1)]


def parsed_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parses the metadata of a safetensors file. JSON texts become values; other texts are unchanged."""
    result = {}
    for key, text in metadata.items():
        try:
            result[key] = json.loads(text)
        except (ValueError, RecursionError):
            result[key] = text
    return result


def of_preprocessor(config: Mapping[str, Any], source: str) -> Hyperparameters:
    """Returns mean, std and crop of a Hugging Face preprocessor_config.json.

    Hugging Face scales pixels in 0..255 by `rescale_factor` before it applies mean and std. This project scales them by
    1 / 255. If the config has a centre crop, the result is the remaining fraction of the resized short side. Otherwise
    the image is squeezed to `size`, which is crop 0.
    """
    scale = 1.0 if config.get('do_rescale', True) else 255.0
    if factor := _number(config.get('rescale_factor')):
        scale *= 255 * factor if config.get('do_rescale', True) else 1
    mean, std = _channels(config.get('image_mean')), _channels(config.get('image_std'))
    if config.get('do_normalize') is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    result = {name: Hyperparameter(tuple(round(value / scale, 9) for value in values), source)
              for name, values in (('mean', mean), ('std', std)) if values}
    if config.get('do_resize') is False:  # the size of the uncropped image is unknown
        return result
    size, cropped = _side(config.get('size')), _side(config.get('crop_size'))
    if config.get('do_center_crop') and size and cropped:
        result['crop'] = Hyperparameter(min(cropped / size, 1.0), source)
    elif size and not config.get('do_center_crop'):
        result['crop'] = Hyperparameter(0.0, source)
    return result


def _side(size):
    """Returns the side of a Hugging Face size: a number, or a dict with shortest_edge or height."""
    if isinstance(size, Mapping):
        size = next((size[name] for name in ('shortest_edge', 'height') if name in size), None)
    return _count(size)


def of_model_type(model_type: str) -> Hyperparameters:
    """Returns the defaults of a model type of transformers. A config.json may omit these values."""
    values = {'norm_epsilon': 1e-6 if model_type == 'vit_msn' else 1e-12, 'activation': 'gelu', 'pooling': 'token'}
    return {name: Hyperparameter(value, f'the default of {model_type}') for name, value in values.items()}


def of_model_names(names: Iterable[str], width: int) -> Hyperparameters:
    """Returns the hyperparameters of the first name that is a timm or DeiT model of this width; {} if there is none."""
    for name in names:
        match = re.match(r'(?:hf[-_]hub:\S*/)?(vit|deit)_(tiny|small|base)(?:_distilled)?_patch\d+_', name)
        if match and _HEADS[match[2]] == width // 64:
            activation = 'quick_gelu' if 'quickgelu' in name else 'gelu'
            values = {'heads': _HEADS[match[2]], 'norm_epsilon': 1e-6, 'activation': activation}
            return {key: Hyperparameter(value, f'the name {name}') for key, value in values.items()}
    return {}


def of_moco_path(path: str, width: int) -> Hyperparameters:
    """Returns the hyperparameters of MoCo v3 if the path of the weights names one of its encoders, else {}.

    MoCo v3's vit_small and vit_base have 12 heads.
    """
    encoders = {'base_encoder', 'momentum_encoder'} & {*path.split('.')}
    is_moco = encoders and width in _MOCO_WIDTHS.values()
    return _moco(f'the value of MoCo v3, by {min(encoders)}') if is_moco else {}


def of_moco_arch(arch: Any, width: int) -> Hyperparameters:
    """Returns the hyperparameters of MoCo v3 if `arch` is one of its models, else {}.

    Other programs store the same names, so the values are only assumptions.
    """
    is_moco = isinstance(arch, str) and _MOCO_WIDTHS.get(arch) == width
    return _moco(f'as MoCo v3, by arch {arch}') if is_moco else {}


def _moco(source):
    return {'heads': Hyperparameter(12, source), 'norm_epsilon': Hyperparameter(1e-6, source)}


def resampling_filter(preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Returns the filter that resized the images: Hugging Face's `resample` or timm's `interpolation`; '' if unknown.
    """
    if isinstance(number := preprocessor.get('resample'), int) and 0 <= number < len(_FILTERS):
        return _FILTERS[number]
    nested = config.get('pretrained_cfg')
    name = nested.get('interpolation') if isinstance(nested, Mapping) else None
    return name if isinstance(name, str) else ''


def of_model_family(names: Iterable[str]) -> Hyperparameters:
    """Returns mean, std and crop of the first known model family among the names (timm's vit_*, DeiT), or {}.

    timm's vit_* use mean and std 0.5, except those with a tag in `_IMAGENET_TAGS`.
    """
    for name in names:
        word = name.rpartition('/')[2]
        size = re.match(r'vit_\w+?_patch\d+_(\d+)', word)
        if size and not any(tag in word for tag in _IMAGENET_TAGS):
            values, family = HALVES | {'crop': 0.9 if int(size[1]) < 384 else 1.0}, "as timm's vit_*"
        elif size or word.startswith('deit'):
            values, family = IMAGENET, f'as {"deit" if word.startswith("deit") else "its pretraining"}'
        else:
            continue
        return {key: Hyperparameter(value, f'{family}, by the name {name}') for key, value in values.items()}
    return {}
