"""Targets for the tokens of a training image: class probabilities from the image's label map.

The map is cropped and mirrored like the image. RoI-align then resamples it to the token grid, and to a single cell for
the target of the whole image. A softmax over all classes follows; classes that the map does not store have logit 0.

A departure: the reference stores all L classes, 0.8 GB for a batch of 1,024 images and 1,000 classes. Here a token
stores only the likeliest classes of the map; all other classes share the remaining probability.

RandAugment's rotations, shears and translations are applied to the token grid, by nearest neighbour. The target of the
whole image is then the mean over the tokens. A departure: the reference applies them to the map before cropping.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling, `get_label` of tlt/data/mixup.py.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from evit_jax.data.token_labels.label_maps import LabelMap, LabelMaps
from evit_jax.data.token_labels.roi_align import align, axis_weights
from evit_jax.data.transforms import augment
from evit_jax.data.transforms.geometry import CropWindow

MAX_CLASSES = 10  # maximum number of classes stored for a token


class TokenTargets(NamedTuple):
    """Computes the targets of one image, as rows of a batch.

    A target over L classes is `value` at the classes `index`, plus (1 - sum of value) / L at every class. It sums to 1.
    A value is thus the excess over the target of a class that is not stored. Padding has the value 0.
    """

    maps: LabelMaps
    grid: tuple[int, int]  # rows and columns of tokens

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each array: token_value and token_index [P, K], label_value and label_index [K]."""
        kept = min(MAX_CLASSES, self.maps.metadata.classes)
        dtypes = {'value': np.float32, 'index': np.int32}
        return {f'{kind}_{name}': ((*leading, kept), dtype) for kind, leading in (
            ('token', (math.prod(self.grid),)), ('label', ())) for name, dtype in dtypes.items()}

    def rows(self, example: str, window: CropWindow) -> dict[str, np.ndarray]:
        """Returns the arrays for the window of an example.

        Raises:
          ValueError: the example has no map.
        """
        classes, dense = _dense(self.maps[example])
        tokens, is_resampled = _apply_geometric_ops(_aligned(dense, window, *self.grid), window)
        label = tokens.mean(axis=(0, 1), keepdims=True) if is_resampled else _aligned(dense, window, 1, 1)
        rows, total = {}, self.maps.metadata.classes
        for kind, logits in (('token', tokens), ('label', label)):
            value, column = sparse_softmax(logits.reshape(-1, len(classes)), total, min(MAX_CLASSES, total))
            rows |= {f'{kind}_value': value, f'{kind}_index': np.append(classes, 0).astype(np.int32)[column]}
        return {name: rows[name].reshape(shape) for name, (shape, _) in self.shapes.items()}


def _dense(label_map: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Returns the U classes in a map, and their logits [H, W, U], 0 in cells that do not store the class."""
    classes, column = np.unique(label_map.index, return_inverse=True)
    shape = label_map.index.shape
    dense = np.zeros((*shape[1:], len(classes)), np.float32)
    np.put_along_axis(dense, column.reshape(shape).transpose(1, 2, 0), label_map.value.transpose(1, 2, 0), -1)
    return classes, dense


def _aligned(dense, window, rows, columns):
    """Resamples the map to a grid over the window, [rows, columns, U]."""
    height, width, _ = dense.shape
    row_weights = axis_weights(window.top, window.bottom, height, rows)
    if window.mirrored:
        column_weights = axis_weights(1 - window.right, 1 - window.left, width, columns)[:, ::-1]
    else:
        column_weights = axis_weights(window.left, window.right, width, columns)
    return align(dense, row_weights, column_weights)


def _apply_geometric_ops(tokens, window):
    """Applies RandAugment's geometric operations to the token grid, by nearest neighbour.

    Tokens from outside the image are 0.

    Returns:
      The tokens, and whether any position changed.
    """
    height, width, _ = tokens.shape
    centres = np.meshgrid(*((np.arange(count) + 0.5) / count for count in (width, height)))
    x, y, inside = augment.source_positions(*centres, window.ops, aspect=width / height)
    columns, rows = (np.clip(at * count, 0, count - 1).astype(int) for at, count in ((x, width), (y, height)))
    if inside.all() and np.array_equal((rows * width + columns).ravel(), np.arange(height * width)):
        return tokens, False
    return np.where(inside[..., None], tokens[rows, columns], 0), True


def sparse_softmax(logits: np.ndarray, total: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes a softmax over all classes, and returns its `kept` likeliest classes.

    U classes have logits; the logits of all other classes are 0.

    Args:
      logits: float32 [N, U].
      total: number of all classes.
      kept: number of classes to return.

    Returns:
      value, column: [N, kept] each, best first. A value is the probability minus the mean probability of the classes
      that are not returned. A column is the index of the class in `logits`. Padding has value 0 and column U.
    """
    stored = min(kept, logits.shape[1])
    top = np.maximum(logits.max(axis=1, keepdims=True), 0)
    probability = np.exp(logits - top)
    probability /= probability.sum(axis=1, keepdims=True) + (total - logits.shape[1]) * np.exp(-top)
    column = np.argpartition(-probability, stored - 1, axis=1)[:, :stored]
    order = np.argsort(-np.take_along_axis(probability, column, 1), axis=1, kind='stable')
    column = np.take_along_axis(column, order, 1)
    value = np.take_along_axis(probability, column, 1)
    level = (1 - value.sum(axis=1, keepdims=True)) / (total - stored) if total > stored else 0
    padding = ((0, 0), (0, kept - stored))
    return np.pad(value - level, padding), np.pad(column, padding, constant_values=logits.shape[1])
