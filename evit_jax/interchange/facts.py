"""Facts about a model that decide its logits and that no array's shape shows, read from a file and beside it.

The first source that gives a value counts, and a flag before all of them. A value that no source gives is assumed.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from evit_jax.interchange.pickles import Inert, shown

KEYS = {  # fact -> key of a run's config
    'heads': 'model.heads', 'norm_epsilon': 'model.norm_epsilon', 'activation': 'model.activation',
    'pooling': 'model.pooling', 'mean': 'data.mean', 'std': 'data.std', 'crop': 'data.eval_crop'}
_ACTIVATIONS = {'gelu': ('gelu', 'nn.gelu', 'torch.nn.gelu', 'gelu_python'), 'quick_gelu': ('quick_gelu', 'quickgelu'),
                'gelu_tanh': ('gelu_tanh', 'gelu_new', 'gelu_pytorch_tanh', 'gelu_fast', 'gelu_accurate')}
_POOLINGS = {'token': ('token', 'cls', 'cls_token', 'false'), 'avg': ('avg', 'mean', 'gap', 'true'),
             'avg_fc_norm': ('avg_fc_norm',)}
_NESTED = ('pretrained_cfg', 'model_args', 'model_kwargs', 'args', 'hyper_parameters', 'hparams', 'config', 'cfg',
           'model_config', 'model', 'backbone')
# Names of dicts that are not about the model itself: class names to labels, other models, parts without attention.
_UNRELATED = re.compile('label|class|idx|index|vocab|decoder|teacher|student|predictor|head|neck|text|loss|optim|sched')
_NAMES = ('architecture', 'arch', 'model', 'model_name', 'model_arch', 'backbone')
_DEEPEST = 4
IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALVES = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
_IMAGENET_TAGS = ('dino', 'mae', 'moco', 'ibot')  # tags of timm's vit_* that have ImageNet's mean and std
_FILTERS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')  # Pillow's resampling filters by number
_HEADS = {'tiny': 3, 'small': 6, 'base': 12}  # size in the names of timm and DeiT -> heads
_MOCO_WIDTHS = {'vit_small': 384, 'vit_base': 768}


class Fact(NamedTuple):
    """A value, and where it was found."""

    value: Any
    source: str


Facts = dict[str, Fact]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if is_number else None  # neither NaN nor infinity


def _count(value):
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _channels(value):
    if not isinstance(value, list | tuple) or len(value) != 3:
        return None
    numbers = tuple(map(_number, value))
    return None if None in numbers else numbers


def _one_of(names):
    def read(value):
        if not isinstance(value, str | bool) or value == '':
            return None
        word = str(value).lower()
        return next((name for name, others in names.items() if word in others), shown(str(value)))

    return read


_READERS: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    'heads': (('num_heads', 'num_attention_heads', 'n_heads', 'heads'), _count),
    'norm_epsilon': (('layer_norm_eps', 'norm_epsilon', 'norm_eps', 'layer_norm_epsilon', 'ln_eps'), _number),
    'activation': (('hidden_act', 'act_layer', 'activation'),
                   lambda value: _one_of(_ACTIVATIONS)(value) if isinstance(value, str) else None),
    'pooling': (('global_pool', 'pooling', 'gp'), _one_of(_POOLINGS)),  # True and False: MAE's
    'mean': (('image_mean', 'mean'), _channels), 'std': (('image_std', 'std'), _channels),
    'crop': (('crop_pct', 'eval_crop', 'eval_crop_ratio'), _number)}


def said_in(held: Any, source: str, depth: int = 0, seen: set[int] | None = None) -> Facts:
    """The facts in settings, however deep; those of an outer dict before those of an inner one.

    Inner dicts of other names than the usual ones count last, and only for facts on which they agree.
    """
    held, seen = held.state if isinstance(held, Inert) else held, set() if seen is None else seen
    if not isinstance(held, Mapping) or depth > _DEEPEST or id(held) in seen:
        return {}
    seen.add(id(held))
    found = {}
    for fact, (names, read) in _READERS.items():
        values = [Fact(read(held[name]), f'{name} of {source}') for name in names if name in held]
        if given := [value for value in values if value.value is not None]:
            found[fact] = given[0]
    if str(held.get('crop_mode')) == 'squash':
        found['crop'] = Fact(0.0, f'crop_mode of {source}')
    others = [name for name in held if isinstance(name, str) and name not in _NESTED
              and not _UNRELATED.search(name.lower())]
    usual, other = ([said_in(held[name], f'{shown(name)} {"of" if depth else "in"} {source}', depth + 1, seen)
                     for name in names if name in held] for names in (_NESTED, others))
    for inner in [*usual, _agreed(other)]:
        found = inner | found
    return found


def _agreed(several: list[Facts]) -> Facts:
    """The facts of several dicts, without those that they contradict each other on."""
    values: dict[str, list[Fact]] = {}
    for found in several:
        for fact, value in found.items():
            values.setdefault(fact, []).append(value)
    return {fact: given[0] for fact, given in values.items() if len({value for value, _ in given}) == 1}


def names_in(held: Any, depth: int = 0) -> list[str]:
    """The names of models that stand in settings."""
    held = held.state if isinstance(held, Inert) else held
    if not isinstance(held, Mapping) or depth > _DEEPEST:
        return []
    names = [held[name] for name in _NAMES if isinstance(held.get(name), str)]
    return names + [name for key in _NESTED for name in names_in(held.get(key), depth + 1)]


def texts_as_values(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata of a safetensors file, whose values are all text, with numbers and lists read from it."""
    found = {}
    for key, text in metadata.items():
        try:
            found[key] = json.loads(text)
        except (ValueError, RecursionError):
            found[key] = text
    return found


def of_preprocessor(held: Mapping[str, Any], source: str) -> Facts:
    """Mean, std and crop of Hugging Face's preprocessor_config.json.

    There pixels of 0..255 are scaled by `rescale_factor` before mean and std; here by 1 / 255. Its images are squeezed
    to `size`, or resized by their shortest edge, then cropped: the crop is the share that is left of that edge.
    """
    scale = 1.0 if held.get('do_rescale', True) else 255.0
    if factor := _number(held.get('rescale_factor')):
        scale *= 255 * factor if held.get('do_rescale', True) else 1
    mean, std = _channels(held.get('image_mean')), _channels(held.get('image_std'))
    if held.get('do_normalize') is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    found = {name: Fact(tuple(round(value / scale, 9) for value in values), source)
             for name, values in (('mean', mean), ('std', std)) if values}
    if held.get('do_resize') is False:  # no share of a resized image is known
        return found
    size, cropped = _side(held.get('size')), _side(held.get('crop_size'))
    if held.get('do_center_crop') and size and cropped:
        found['crop'] = Fact(min(cropped / size, 1.0), source)
    elif size and not held.get('do_center_crop'):
        found['crop'] = Fact(0.0, source)  # squeezed to a square
    return found


def _side(size):
    """The side of a size as Hugging Face writes it: a number, or a dict."""
    if isinstance(size, Mapping):
        size = next((size[name] for name in ('shortest_edge', 'height') if name in size), None)
    return _count(size)


def of_hugging_face(kind: str, source: str) -> Facts:
    """The defaults of a model type of transformers, which its config leaves out where they hold."""
    epsilon = 1e-6 if kind == 'vit_msn' else 1e-12
    values = {'norm_epsilon': epsilon, 'activation': 'gelu', 'pooling': 'token'}
    return {fact: Fact(value, source) for fact, value in values.items()}


def of_names(names: Iterable[str], width: int) -> Facts:
    """The facts that a model's name in timm, DeiT or MoCo v3 stands for; {} for other names."""
    for name in names:
        match = re.match(r'(?:hf[-_]hub:\S*/)?(vit|deit)_(tiny|small|base)(?:_distilled)?_patch\d+_', name)
        if match and _HEADS[match[2]] == width // 64:
            activation = 'quick_gelu' if 'quickgelu' in name else 'gelu'
            values = {'heads': _HEADS[match[2]], 'norm_epsilon': 1e-6, 'activation': activation}
            return {fact: Fact(value, f'the name {name}') for fact, value in values.items()}
    return {}


def of_moco(label: str, width: int) -> Facts:
    """The facts of MoCo v3, whose vit_small and vit_base have 12 heads, by the prefix of its encoders."""
    encoders = {'base_encoder', 'momentum_encoder'} & {*label.split('.')}
    is_moco = encoders and width in _MOCO_WIDTHS.values()
    return _moco(f'MoCo v3 has it so, by {min(encoders)}') if is_moco else {}


def assumed_of_moco(arch: Any, width: int) -> Facts:
    """The facts of MoCo v3, whose files name their `arch` so; those of other programs may, too."""
    is_moco = isinstance(arch, str) and _MOCO_WIDTHS.get(arch) == width
    return _moco(f'as MoCo v3, by arch {arch}') if is_moco else {}


def _moco(source):
    return {'heads': Fact(12, source), 'norm_epsilon': Fact(1e-6, source)}


def resampling(preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The filter that images were resized with, by `resample` of Hugging Face or `interpolation` of timm, or ''."""
    if isinstance(number := preprocessor.get('resample'), int) and 0 <= number < len(_FILTERS):
        return _FILTERS[number]
    nested = config.get('pretrained_cfg')
    name = nested.get('interpolation') if isinstance(nested, Mapping) else None
    return name if isinstance(name, str) else ''


def of_family(names: Iterable[str]) -> Facts:
    """Mean, std and crop as the family of a model's name has them: timm's vit_* are trained on 0.5 and 0.5."""
    for name in names:
        word = name.rpartition('/')[2]
        size = re.match(r'vit_\w+?_patch\d+_(\d+)', word)
        if size and not any(tag in word for tag in _IMAGENET_TAGS):
            values, family = HALVES | {'crop': 0.9 if int(size[1]) < 384 else 1.0}, "as timm's vit_*"
        elif size or word.startswith('deit'):
            values, family = IMAGENET, f'as {"deit" if word.startswith("deit") else "its pretraining"}'
        else:
            continue
        return {fact: Fact(value, f'{family}, by the name {name}') for fact, value in values.items()}
    return {}
