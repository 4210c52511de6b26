"""Finds the weights of a vision transformer in a checkpoint and renames them to timm's array names.

DeiT, EViT, DynamicViT and LV-ViT use timm's names, and add a few. Only the names of Hugging Face differ.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from evit_jax.interchange import nested_checkpoints
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.restricted_pickle import InertObject, printable

HUGGING_FACE = 'Hugging Face'
_MARKERS = {  # layout -> prefixes of array names that occur only in this layout
    'LV-ViT': ('aux_head.', 'patch_embed.conv1.'), 'DynamicViT': ('score_predictor.',)}

_BLOCK = r'(?:encoder\.layer|layers)\.(\d+)\.'  # names of transformers up to version 4, and of version 5
_HUGGING_FACE = [(re.compile(rf'(?:(?:vit|deit)\.)?{hugging_face}\.(weight|bias)'), timm) for hugging_face, timm in (
    (r'embeddings\.patch_embeddings\.projection', r'patch_embed.proj.\1'),
    (_BLOCK + r'layernorm_before', r'blocks.\1.norm1.\2'),
    (_BLOCK + r'layernorm_after', r'blocks.\1.norm2.\2'),
    (_BLOCK + r'attention\.(?:attention\.query|q_proj)', r'blocks.\1.attn.q.\2'),
    (_BLOCK + r'attention\.(?:attention\.key|k_proj)', r'blocks.\1.attn.k.\2'),
    (_BLOCK + r'attention\.(?:attention\.value|v_proj)', r'blocks.\1.attn.v.\2'),
    (_BLOCK + r'attention\.(?:output\.dense|o_proj)', r'blocks.\1.attn.proj.\2'),
    (_BLOCK + r'(?:intermediate\.dense|mlp\.fc1)', r'blocks.\1.mlp.fc1.\2'),
    (_BLOCK + r'(?:output\.dense|mlp\.fc2)', r'blocks.\1.mlp.fc2.\2'),
    (r'layernorm', r'norm.\1'), (r'(?:cls_)?classifier', r'head.\1'), (r'distillation_classifier', r'head_dist.\1'),
)] + [(re.compile(rf'(?:(?:vit|deit)\.)?embeddings\.{hugging_face}'), timm) for hugging_face, timm in (
    ('cls_token', 'cls_token'), ('distillation_token', 'dist_token'), ('position_embeddings', 'pos_embed'))]


class ModelWeights(NamedTuple):
    """The weights of a model by timm's names, with their layout, training arguments and location."""

    arrays: dict[str, LazyArray]
    layout: str                         # timm, Hugging Face, LV-ViT or DynamicViT
    training_arguments: dict[str, Any]  # command-line arguments of the training program; {} if not stored
    path: str                           # location in the checkpoint: dict names and prefix, joined by dots


def find_weights(tree: Any, *, ema: bool, key: str = '') -> ModelWeights:
    """Finds the weights of one model in the contents of a file.

    Args:
      tree: nested dicts with arrays.
      ema: select the moving average of the weights.
      key: name of the dict, or prefix of the array names, that holds the weights; see
        `nested_checkpoints.select_weights`.

    Raises:
      ValueError: the file holds no weights, no moving average or several models, or two arrays have the same timm name.
    """
    arrays, path = nested_checkpoints.select_weights(tree, ema=ema, key=key)
    arguments = tree.get('args') if isinstance(tree, Mapping) else None
    if isinstance(arguments, InertObject):
        arguments = arguments.state
    layout = next((name for name, prefixes in _MARKERS.items() if any(key.startswith(prefixes) for key in arrays)),
                  'timm')
    if any(re.match(r'(?:(?:vit|deit)\.)?embeddings\.', key) for key in arrays):
        arrays, layout = _from_hugging_face(arrays), HUGGING_FACE
    return ModelWeights(arrays, layout, arguments if isinstance(arguments, dict) else {}, path)


def _from_hugging_face(arrays):
    """Renames arrays to timm's names, and joins query, key and value of each block. Unknown arrays keep their names."""
    out = {}
    for key, value in arrays.items():
        name = next((match.expand(timm) for pattern, timm in _HUGGING_FACE if (match := pattern.fullmatch(key))), key)
        if name in out:
            raise ValueError(f'two arrays have the timm name {name}, one of them {printable(key)}')
        out[name] = value
    for query in [name for name in out if re.fullmatch(r'blocks\.\d+\.attn\.q\.\w+', name)]:
        names = [query.replace('.attn.q.', f'.attn.{part}.') for part in 'qkv']
        parts = [out[name] for name in names if name in out]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1 and parts[0].shape:
            for name in names:
                del out[name]
            out[query.replace('.attn.q.', '.attn.qkv.')] = _concatenated(parts)
    return out


def _concatenated(parts):
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts]))
