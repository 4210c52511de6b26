"""Reads hyperparameters from settings, configs and names.

A hyperparameter changes the logits but cannot be inferred from array shapes, such as the number of heads. Each function
reads one kind of source. `hyperparameters.resolve` applies their precedence.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from evit_jax.interchange.restricted_pickle import InertObject, printable

PREPROCESSING = {'mean': 'data.mean', 'std': 'data.std', 'crop': 'data.eval_crop'}  # -> key of a run's config
MODEL_FIELDS = ('heads', 'norm_epsilon', 'activation', 'pooling', 'rope', 'rope_base', 'rope_grid', 'position_resize')
HYPERPARAMETERS = (*MODEL_FIELDS, *PREPROCESSING)
_ACTIVATIONS = {'gelu': ('gelu', 'nn.gelu', 'torch.nn.gelu', 'gelu_python'), 'quick_gelu': ('quick_gelu', 'quickgelu'),
                'gelu_tanh': ('gelu_tanh', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'gelu_accurate'),
                'silu': ('silu', 'swish')}
_POOLINGS = {'token': ('token', 'cls', 'cls_token', 'false'), 'avg': ('avg', 'mean', 'gap', 'true'),
             'avg_fc_norm': ('avg_fc_norm',), 'token_avg': ('token_avg',), 'map': ('map',)}
_ROPES = {'': ('',), 'eva': ('eva', 'cat'), 'dinov3': ('dinov3',), 'mixed': ('mixed',), 'mrope': ('mrope',)}
_NESTED = ('pretrained_cfg', 'model_args', 'model_kwargs', 'args', 'hyper_parameters', 'hparams', 'config', 'cfg',
           'model_config', 'model', 'backbone')
# Dicts whose names match describe class labels, other models, or parts without attention.
_UNRELATED = re.compile('label|class|idx|index|vocab|decoder|teacher|student|predictor|head|neck|text|loss|optim|sched')
_NAMES = ('architecture', 'arch', 'model', 'model_name', 'model_arch', 'backbone')
_MAX_DEPTH = 4
_MOCO_WIDTHS = {'vit_small': 384, 'vit_base': 768}


class Hyperparameter(NamedTuple):
    """A value, and a description of its source for messages."""

    value: Any
    source: str


Hyperparameters = dict[str, Hyperparameter]  # has a subset of the names in HYPERPARAMETERS


def as_number(value: Any) -> float | None:
    """Returns a finite number as a float, and None for another value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None  # the bound excludes NaN and infinity


def as_count(value: Any) -> int | None:
    """Returns an integer, and None for another value."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value):
    return printable(value) if isinstance(value, str) else None


def as_channels(value: Any) -> tuple[float, ...] | None:
    """Returns three numbers as a tuple, and None for another value."""
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    numbers = tuple(map(as_number, value))
    return None if None in numbers else numbers


def _rope(value):
    """Returns the name of rotary positions; '' for timm's use_rot_pos_emb=False."""
    if value is False:
        return ''
    return next((name for name, synonyms in _ROPES.items() if value in synonyms), None) if isinstance(
        value, str) else None


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
    'heads': (('num_heads', 'num_attention_heads', 'n_heads', 'heads'), as_count),
    'norm_epsilon': (('layer_norm_eps', 'norm_epsilon', 'norm_eps', 'layer_norm_epsilon', 'ln_eps'), as_number),
    'activation': (('hidden_act', 'act_layer', 'activation'),
                   lambda value: _one_of(_ACTIVATIONS)(value) if isinstance(value, str) else None),
    'pooling': (('global_pool', 'pooling', 'gp'), _one_of(_POOLINGS)),  # MAE stores True or False
    'rope': (('use_rot_pos_emb', 'rope_type', 'rope'), _rope),
    'rope_base': (('rope_theta', 'rope_temperature', 'rope_base'), as_number),
    'rope_grid': (('ref_feat_shape', 'rope_grid'), lambda value: as_count(
        value[0] if isinstance(value, list | tuple) and value else value)),
    'position_resize': (('position_resize',), _text),
    'mean': (('image_mean', 'mean'), as_channels), 'std': (('image_std', 'std'), as_channels),
    'crop': (('crop_pct', 'eval_crop', 'eval_crop_ratio'), as_number)}


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
