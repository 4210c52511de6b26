"""How the weights of a vision transformer lie in the files of timm, DeiT, EViT, Hugging Face, DynamicViT and LV-ViT.

All but Hugging Face's have timm's names, which are therefore the ones that everything is brought to.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from evit_jax.interchange import wrapped
from evit_jax.interchange.pickles import Inert, shown
from evit_jax.interchange.stored import Stored

HUGGING_FACE = 'Hugging Face'
_MARKS = {'LV-ViT': ('aux_head.', 'patch_embed.conv1.'), 'DynamicViT': ('score_predictor.',)}

_BLOCK = r'(?:encoder\.layer|layers)\.(\d+)\.'  # transformers up to 4, and the modules of 5
_HUGGING_FACE = [(re.compile(rf'(?:(?:vit|deit)\.)?{theirs}\.(weight|bias)'), ours) for theirs, ours in (
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
)] + [(re.compile(rf'(?:(?:vit|deit)\.)?embeddings\.{theirs}'), ours) for theirs, ours in (
    ('cls_token', 'cls_token'), ('distillation_token', 'dist_token'), ('position_embeddings', 'pos_embed'))]


class Found(NamedTuple):
    """Weights in timm's layout, and what stood beside them."""

    arrays: dict[str, Stored]
    layout: str                # timm, Hugging Face, LV-ViT or DynamicViT
    settings: dict[str, Any]   # of the training program, where the file kept its arguments
    label: str                 # dicts and prefix that they were taken from


def find(tree: Any, *, ema: bool, key: str = '') -> Found:
    """The weights of a model in what a file held.

    Args:
      tree: of dicts, with arrays somewhere in it.
      ema: take the moving average of the weights.
      key: the dict, or the prefix, that holds the weights, as `wrapped.take` has it.

    Raises:
      ValueError: there are no weights, no average, two models, or two arrays of one name here; says what there is.
    """
    arrays, label = wrapped.take(tree, ema=ema, key=key)
    kept = tree.get('args') if isinstance(tree, Mapping) else None
    settings = kept.state if isinstance(kept, Inert) else kept
    layout = next((name for name, marks in _MARKS.items() if any(key.startswith(marks) for key in arrays)), 'timm')
    if any(re.match(r'(?:(?:vit|deit)\.)?embeddings\.', key) for key in arrays):
        arrays, layout = _from_hugging_face(arrays), HUGGING_FACE
    return Found(arrays, layout, settings if isinstance(settings, dict) else {}, label)


def _from_hugging_face(arrays):
    """Renamed; query, key and value of a block become one. What is not known keeps its name."""
    out = {}
    for key, value in arrays.items():
        name = next((match.expand(ours) for theirs, ours in _HUGGING_FACE if (match := theirs.fullmatch(key))), key)
        if name in out:
            raise ValueError(f'two arrays would be {name}, one of them {shown(key)}')
        out[name] = value
    for first in [name for name in out if re.fullmatch(r'blocks\.\d+\.attn\.q\.\w+', name)]:
        names = [first.replace('.attn.q.', f'.attn.{part}.') for part in 'qkv']
        parts = [out[name] for name in names if name in out]
        if len(parts) == 3 and len({part.shape for part in parts}) == 1 and parts[0].shape:
            for name in names:
                del out[name]
            out[first.replace('.attn.q.', '.attn.qkv.')] = _stacked(parts)
    return out


def _stacked(parts):
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return Stored(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts]))
