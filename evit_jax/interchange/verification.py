"""Compares converted models with timm or transformers, if they are installed."""

import importlib
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax.interchange import hugging_face_models, timm_calls, torch_weights, weight_files
from evit_jax.models import Params, create
from evit_jax.models.config import ViTConfig, as_hw
from evit_jax.reduction.plan import make_plan

TOLERANCE = 1e-3  # relative to the largest output
_IMAGES = 2


def check(path: str | os.PathLike | None, params: Params, config: ViTConfig) -> float:
    """Checks that a converted model computes the outputs of the original program, and logs the largest difference.

    The program is the one of the config.json beside the weights. Without one, timm's model of the same config is used:
    then values that were assumed are not checked.

    Args:
      path: file or folder of the original weights; None: there is none.
      params, config: the converted model, before a change of its image size.

    Returns:
      The largest difference between the outputs for random images, relative to the largest output.

    Raises:
      ValueError: the program is not installed or has no such model, or the difference is larger than `TOLERANCE`.
    """
    images = np.random.default_rng(0).normal(size=(_IMAGES, *as_hw(config.image_size), 3)).astype(np.float32)
    program, expected = _original_outputs(path, params, config, images)
    plan = make_plan(config.patches(config.image_size), config.depth, reduce_at=())
    outputs = np.asarray(create(config).apply(params, jnp.asarray(images), plan)[0])
    if outputs.shape != expected.shape:
        raise ValueError(f'--check: {program} has outputs of shape {expected.shape}, the converted model of '
                         f'{outputs.shape}: one of them has no head, or another')
    difference = float(np.abs(outputs - expected).max() / max(np.abs(expected).max(), 1e-12))
    what = 'logits' if config.classes and not config.projection else 'features'
    logging.info('check: the largest difference from the %s of %s is %.1e of the largest value, for %d random images',
                 what, program, difference, _IMAGES)
    if not difference <= TOLERANCE:  # NaN fails too
        raise ValueError(f'--check: the {what} differ from those of {program} by {difference:.1e} of the largest '
                         f'value; at most {TOLERANCE:g} is expected. Compare the logged values with those of the '
                         'model, and give the differing ones as flags')
    return difference


def _original_outputs(path, params, config, images) -> tuple[str, np.ndarray]:
    """Returns the name of the program and its outputs, [B, L] float32."""
    settings: dict[str, Any] = {}
    if path is not None:
        folder = pathlib.Path(path).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        settings = weight_files.read_configs(folder / weight_files.CONFIG).get(weight_files.CONFIG, {})
    torch = _module('torch', 'timm' if 'model_type' not in settings else 'transformers')
    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        if 'architecture' in settings:
            model = _module('timm').create_model(f'local-dir:{folder}', pretrained=True).eval()
            return f'{settings["architecture"]} of timm', model(x).numpy()
        if 'model_type' in settings:
            return _transformers_outputs(folder, settings, x)
        timm = timm_calls.timm_model(config, torch_weights.to_torch(params, config))
        if isinstance(timm, str):
            raise ValueError(f'--check: there is no config.json that names the original program, and {timm}')
        logging.warning('check: no config.json names the original program: compared with timm under the same values, '
                        'so that a wrong value goes unnoticed')
        model = _module('timm').create_model(timm.name, **timm.arguments).eval()
        model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in timm.arrays.items()})
        return f'{timm.name} of timm', model(x).numpy()


def _transformers_outputs(folder, settings, x):
    transformers = _module('transformers')
    name = (settings.get('architectures') or ['AutoModel'])[0]
    model = getattr(transformers, name).from_pretrained(folder).eval()
    if settings['model_type'] in ('clip', 'siglip') and hasattr(model, 'get_image_features'):
        outputs = model.get_image_features(pixel_values=x)
    elif settings['model_type'] == 'vit_mae':
        model.config.mask_ratio = 0.0  # the class token does not depend on the order of the patches
        outputs = getattr(model, 'vit', model)(pixel_values=x)
    else:
        outputs = model(pixel_values=x)
    pools = hugging_face_models.vision_config(settings)['model_type'].startswith(('clip', 'siglip'))
    for key in ('logits', 'image_embeds') + ('pooler_output',) * pools:
        if getattr(outputs, key, None) is not None:
            return f'{name} of transformers', getattr(outputs, key).numpy()
    if not pools and not hasattr(outputs, 'last_hidden_state'):  # a model for masked images
        outputs = model.base_model(pixel_values=x)
    outputs = outputs if pools else outputs.last_hidden_state[:, 0]
    return f'{name} of transformers', outputs.numpy()


def _module(name, user=''):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        packages = ' '.join(dict.fromkeys(filter(None, ('torch', user or name))))
        raise ValueError(f'--check compares with {user or name}, which needs {name}, and that is not installed '
                         f'({error}): pip install {packages}, or leave out --check') from error
