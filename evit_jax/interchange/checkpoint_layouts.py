"""Finds the weights of a vision transformer in a checkpoint and renames them to timm's array names.

DeiT, EViT, DynamicViT and LV-ViT use timm's names, and add a few. The names of Hugging Face, of timm's Eva and of
DINOv2's code differ.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from evit_jax.interchange import names_hugging_face, names_timm, nested_checkpoints
from evit_jax.interchange.lazy_array import LazyArray
from evit_jax.interchange.restricted_pickle import InertObject

HUGGING_FACE = 'Hugging Face'
_MARKERS = {  # layout -> prefixes of array names that occur only in this layout
    'LV-ViT': ('aux_head.', 'patch_embed.conv1.'), 'DynamicViT': ('score_predictor.',)}


class ModelWeights(NamedTuple):
    """The weights of a model by timm's names, with their layout, training arguments and location."""

    arrays: dict[str, LazyArray]
    layout: str                         # timm, EVA, DINOv2, Hugging Face, LV-ViT or DynamicViT
    training_arguments: dict[str, Any]  # command-line arguments of the training program; {} if not stored
    path: str                           # location in the checkpoint: dict names and prefix, joined by dots
    is_projection: bool = False         # the head makes an embedding (CLIP)


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
    is_projection = any(name.endswith('visual_projection.weight') for name in arrays)
    if names_hugging_face.is_hugging_face(arrays):
        arrays, layout = names_hugging_face.from_hugging_face(arrays), HUGGING_FACE
    else:
        arrays, layout = names_timm.from_timm(arrays)
    layout = next((name for name, prefixes in _MARKERS.items() if any(key.startswith(prefixes) for key in arrays)),
                  layout)
    return ModelWeights(arrays, layout, arguments if isinstance(arguments, dict) else {}, path, is_projection)
