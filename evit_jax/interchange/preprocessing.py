"""Reads mean, std and crop of a model from configs, or assumes them by the family of the model."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from evit_jax.data.transforms.geometry import FILTERS
from evit_jax.interchange.hyperparameter_sources import (
    Hyperparameter,
    Hyperparameters,
    as_channels,
    as_count,
    as_number,
)

IMAGENET = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
HALVES = {'mean': (0.5,) * 3, 'std': (0.5,) * 3}
CLIP = {'mean': (0.48145466, 0.4578275, 0.40821073), 'std': (0.26862954, 0.26130258, 0.27577711)}
_IMAGENET_TAGS = ('dino', 'mae', 'moco', 'ibot', '_rope_reg')  # parts of names of timm's vit_* with ImageNet's values


def of_preprocessor(config: Mapping[str, Any], source: str) -> Hyperparameters:
    """Returns mean, std and crop of a Hugging Face preprocessor_config.json.

    Hugging Face scales pixels in 0..255 by `rescale_factor` before it applies mean and std. This project scales them by
    1 / 255. If the config has a centre crop, the result is the remaining fraction of the resized short side. Otherwise
    the image is squeezed to `size`, which is crop 0.
    """
    scale = 1.0 if config.get('do_rescale', True) else 255.0
    if factor := as_number(config.get('rescale_factor')):
        scale *= 255 * factor if config.get('do_rescale', True) else 1
    mean, std = as_channels(config.get('image_mean')), as_channels(config.get('image_std'))
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
    return as_count(size)


def resampling_filter(preprocessor: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Returns the filter that resized the images: Hugging Face's `resample` or timm's `interpolation`; '' if unknown.
    """
    if isinstance(index := preprocessor.get('resample'), int) and 0 <= index < len(FILTERS):
        return FILTERS[index]
    nested = config.get('pretrained_cfg')
    name = nested.get('interpolation') if isinstance(nested, Mapping) else None
    return name if isinstance(name, str) else ''


def of_model_family(names: Iterable[str]) -> Hyperparameters:
    """Returns mean, std and crop of the first known model family among the names (timm's models, DeiT), or {}.

    timm's vit_* use mean and std 0.5, except those with a part in `_IMAGENET_TAGS`, and CLIP and EVA.
    """
    for name in names:
        word = name.rpartition('/')[2]
        size = re.search(r'_patch\d+_(?:\w*_)?(\d{3})(?:\.|_|$)', word)
        is_vit = word.startswith('vit_') and '_patch' in word
        if word.startswith('eva') or (is_vit and '_clip_' in word):
            values, family = CLIP | {'crop': 1.0}, "as timm's CLIP and EVA"
        elif is_vit and not any(tag in word for tag in _IMAGENET_TAGS):
            is_small = size and int(size[1]) < 384 and '_siglip_' not in word
            values, family = HALVES | {'crop': 0.9 if is_small else 1.0}, "as timm's vit_*"
        elif is_vit or word.startswith('deit'):
            values, family = IMAGENET, f'as {"deit" if word.startswith("deit") else "its pretraining"}'
        else:
            continue
        return {key: Hyperparameter(value, f'{family}, by the name {name}') for key, value in values.items()}
    return {}
