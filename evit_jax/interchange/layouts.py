"""How the weights of a vision transformer lie in the files of timm, DeiT, EViT, Hugging Face, DynamicViT and LV-ViT.

All but Hugging Face's have timm's names, which are therefore the ones that everything is brought to.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.interchange.pickles import Inert, shown
from evit_jax.interchange.stored import Stored

_WEIGHTS = ('model', 'state_dict', 'model_state_dict')
_AVERAGES = ('model_ema', 'state_dict_ema', 'ema')
_PREFIXES = ('module.', 'model.', '_orig_mod.')  # of DataParallel, of a model within one, of torch.compile
_DEEPEST = 8
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


def find(tree: Any, *, ema: bool) -> Found:
    """The weights of a model in what a file held.

    Args:
      tree: of dicts, with arrays somewhere in it.
      ema: take the moving average of the weights.

    Raises:
      ValueError: there are no weights, no average, or two that have the same name here; says what there is.
    """
    arrays = _without_prefixes(_state_in(tree, ema))
    kept = tree.get('args') if isinstance(tree, Mapping) else None
    settings = kept.state if isinstance(kept, Inert) else kept
    layout = next((name for name, marks in _MARKS.items() if any(key.startswith(marks) for key in arrays)), 'timm')
    if any(re.match(r'(?:(?:vit|deit)\.)?embeddings\.', key) for key in arrays):
        arrays, layout = _from_hugging_face(arrays), 'Hugging Face'
    return Found(arrays, layout, settings if isinstance(settings, dict) else {})


def _state_in(tree, ema):
    """The dict of arrays, which may stand in other dicts."""
    node, path = tree, []
    while name := _inner(node, ema and not _is_average(path)):
        path, node = [*path, name], node[name]
        if len(path) > _DEEPEST:
            raise ValueError(f'its weights are nested more than {_DEEPEST} deep')
    arrays = _arrays_of(node)
    if not arrays:
        held = [shown(str(key)) for key in node] if isinstance(node, Mapping) else [f'one {type(node).__name__}']
        raise ValueError(f'it holds no weights by name, but {_some(held) or "nothing"}')
    if ema and not _is_average(path):
        raise ValueError(f'it holds no moving average ({", ".join(_AVERAGES)}): leave out --ema')
    if path:
        logging.info('took %s%s; there are: %s', '.'.join(path), ', a moving average' * _is_average(path),
                     _some([shown(str(key)) for key in tree]))
    if others := [shown(str(key)) for key in node if key not in arrays]:
        logging.info('left out what is no array: %s', _some(others))
    return arrays


def _inner(node, average):
    """Name of the dict in which to look on; an average only if it is wanted, or there is nothing else."""
    dicts = [name for name in (*_AVERAGES, *_WEIGHTS)
             if isinstance(node, Mapping) and isinstance(node.get(name), Mapping)]
    wanted = dicts if average else [name for name in dicts if name not in _AVERAGES]
    return next(iter(wanted or ([] if _arrays_of(node) else dicts)), None)


def _arrays_of(node):
    items = node.items() if isinstance(node, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, Stored) and isinstance(key, str)}


def _is_average(path):
    return bool({*path} & {*_AVERAGES})


def _without_prefixes(arrays):
    while prefix := next((prefix for prefix in _PREFIXES if all(key.startswith(prefix) for key in arrays)), None):
        arrays = {key.removeprefix(prefix): value for key, value in arrays.items()}
    return arrays


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


def _some(words, most=12):
    return ', '.join(words[:most]) + (f' and {len(words) - most} more' if len(words) > most else '')
