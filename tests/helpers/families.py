"""Reference cases of tests/golden/families: tiny models of timm and transformers, with their recorded outputs."""

import functools
import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

from tests.helpers import family_rule

FOLDER = pathlib.Path(__file__).parents[1] / 'golden' / 'families'
SAVED = 'saved'  # the array names of the recorded file


@functools.cache
def cases():
    """Returns the cases by name. 'format' in cases.json describes them."""
    return json.loads((FOLDER / 'cases.json').read_text())['cases']


@functools.cache
def timm_table():
    """Returns the table of timm's models. 'format' in timm_models.json describes it."""
    return json.loads((FOLDER / 'timm_models.json').read_text())


def sizes(name):
    """Returns the image sizes of a case, (height, width); the first is native."""
    return [tuple(size) for size in cases()[name]['sizes']]


def outputs(name, size):
    """Returns the recorded features, logits and patch tokens at a size; patch tokens only for the first image."""
    with np.load(FOLDER / f'{name}.npz') as file:
        recorded = {key.removesuffix(f'_{size[0]}x{size[1]}'): file[key] for key in file if key.endswith(
            f'_{size[0]}x{size[1]}')}
    return {'logits': recorded['features']} | recorded


def arrays(name, layout=SAVED):
    """Rebuilds the weights of a case by name.

    Args:
      layout: SAVED, or a key of the case's `other_names`.
    """
    weights = family_rule.make_weights(cases()[name]['arrays'])
    if layout == SAVED:
        return weights
    renamed = {}
    for key, source in cases()[name]['other_names'][layout].items():
        saved, *rows = [source] if isinstance(source, str) else source
        renamed[key] = weights[saved][slice(*rows)] if rows else weights[saved]
    return renamed


def num_values(name):
    """Returns the number of values that the outputs of a case depend on."""
    return sum(value.size for key, value in arrays(name).items() if key not in cases()[name]['unused'])


def write(folder, name, layout=SAVED):
    """Writes the files of a case as its authors' library does: weights, config.json, preprocessor_config.json."""
    folder.mkdir(exist_ok=True)
    for file, content in cases()[name]['configs'].items():
        (folder / file).write_text(json.dumps(content))
    save_file(arrays(name, layout), folder / 'model.safetensors', {'format': 'pt'})
    return folder


def differences(config, expected):
    """Returns the fields of a ViTConfig that differ, with (value, expected value).

    Args:
      expected: fields as in timm_models.json.
    """
    wanted = {key: tuple(value) if isinstance(value, list) else value for key, value in expected.items()}
    actual = {key: getattr(config, key) for key in wanted}
    for values in (wanted, actual):  # a file has no initial values, and the number of units in place of the ratio
        values['layer_scale'] = values['layer_scale'] > 0
        values['mlp_ratio'] = round(values['mlp_ratio'] * expected['width'])
        if not expected['absolute_positions']:
            values['position_resize'] = ''
    return {key: (actual[key], value) for key, value in wanted.items() if actual[key] != value}


def images(name, size):
    """Rebuilds the normalised images of a case, [2, H, W, 3]."""
    return family_rule.make_images(name, size)
