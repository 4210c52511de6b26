"""Files of a small pretrained model as on the Hugging Face Hub, with random weights."""

import functools
import json

import numpy as np
from safetensors.numpy import save

import evit_jax
from evit_jax.inference.model import VisionModel
from evit_jax.interchange import pretrained_files
from tests.helpers import tiny

CLASSES = 'class a', 'class b', 'class c'


@functools.cache
def model(seed=0):
    """The model of the files, with all tokens."""
    created = evit_jax.create_model(tiny.CONFIG, keep_rate=1.0, reduce_at=(1,), class_names=CLASSES, seed=seed)
    return VisionModel(created.loaded._replace(mean=(0.5,) * 3, std=(0.25,) * 3, eval_crop=1.0))


@functools.cache
def files(seed=0):
    """Returns file name -> content, in timm's layout."""
    written = pretrained_files.timm_files(model(seed).loaded)
    arrays = {key: np.ascontiguousarray(value) for key, value in written.arrays.items()}  # `save` needs this order
    return {'model.safetensors': save(arrays, {'format': 'pt'})} | {
        name: json.dumps(content).encode() for name, content in written.configs.items()}
