"""Digests of a model's architecture and weights. Plan files contain them to identify the model of the search."""

import dataclasses
import hashlib
import json

import jax
import numpy as np

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints.weights import by_name
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig

_DIGITS = 16
# Fields that do not affect the encoder. Fine-tuning replaces the head, also the projection of CLIP.
_IGNORED = ('image_size', 'classes', 'projection', 'head_bias', 'init_std')


def digest_of_architecture(config: ViTConfig) -> str:
    """Returns 16 hexadecimal digits that are equal for models that a token plan fits equally.

    Image size, head and the scale of the initial weights do not count, so a fine-tuned model has the digest of its base
    model. Fields with default values do not count either, so a new field leaves the digests of older models unchanged.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    stored = model_configs.to_json(config)
    fields = {name: value for name, value in stored['fields'].items()
              if name not in _IGNORED and getattr(config, name) != defaults[name]}
    return hashlib.sha256(json.dumps(stored | {'fields': fields}, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def digest_of_weights(params: Params) -> str:
    """Returns 16 hexadecimal digits of the patch embedding and of the first and last block, as float32.

    Two blocks are enough to detect a training of the encoder, and are read in a fraction of a second. The head does not
    count, so a linear probe has the digest of its backbone.
    """
    blocks = params['blocks']
    arrays = by_name({'patch_embed': params['patch_embed'],
                      'blocks': {block: blocks[block] for block in (min(blocks), max(blocks))}})
    result = hashlib.sha256()
    for name in sorted(arrays):
        result.update(name.encode())
        result.update(np.ascontiguousarray(jax.device_get(arrays[name]), np.float32))
    return result.hexdigest()[:_DIGITS]
