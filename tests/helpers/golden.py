"""Reference cases: outputs recorded from the PyTorch implementations in tests/golden.

Weights and images are rebuilt from names by `golden_rule`.
"""

import dataclasses
import functools
import json
import pathlib
import re
import zlib

import jax.numpy as jnp
import numpy as np

from evit_jax.interchange.torch_weights import from_torch
from evit_jax.models import create, get_config
from tests.helpers import golden_rule

FOLDER = pathlib.Path(__file__).parents[1] / 'golden'


@functools.cache
def manifest(file='manifest.json'):
    """Reads the description of reference cases and of their models."""
    return json.loads((FOLDER / file).read_text())


def cases(file='manifest.json'):
    """Returns the cases of a manifest by name."""
    return {case['name']: case for case in manifest(file)['cases']}


def outputs(case):
    """Loads the recorded outputs of a case."""
    return np.load(FOLDER / f'{case["name"]}.npz')


def make_weights(model, file='manifest.json'):
    """Rebuilds the PyTorch weights of a model of a manifest."""
    return golden_rule.make_weights(manifest(file)['models'][model]['state_dict'])


def make_images(case):
    """Rebuilds the images of a case, [B, H, W, 3], and checks that their bits are those of the recording."""
    images = golden_rule.make_images(case['image_name'], case['batch'], case['image_size'])
    assert zlib.crc32(images.tobytes()) == case['images_crc32']
    return jnp.asarray(images.transpose(0, 2, 3, 1))


@functools.cache
def deit(name):
    """Returns the model and the parameters of a DeiT such as `deit_tiny_224`."""
    size, image_size = re.fullmatch(r'deit_(\w+)_(\d+)', name).groups()
    config = dataclasses.replace(get_config(f'deit_{size[0]}'), image_size=int(image_size))
    return create(config), from_torch(make_weights(name), config)
