"""Targets for the tokens of a training image: class probabilities from the image's label map.

The map is cropped and mirrored like the image, and resampled by RoI-align to the token grid and to a single cell, the
target of the whole image. A softmax over all classes follows, in which classes without a logit have the logit 0.

A departure: the reference stores all L classes, 0.8 GB for a batch of 1,024 images and 1,000 classes. Here a token
stores the likeliest of the classes in the map, and all others share the remaining probability.

Tokens follow the rotations, shears and translations of RandAugment, by nearest neighbour. A departure: the reference
moves the map before it crops it. The target of the whole image is then the mean over the tokens.

Source: LV-ViT, arXiv 2104.10858; zihangJiang/TokenLabeling, `get_label` of tlt/data/mixup.py.
"""

from typing import Any, NamedTuple

import numpy as np

from evit_jax.data.token_labels.label_maps import LabelMap, LabelMaps
from evit_jax.data.token_labels.roi_align import align, axis_weights
from evit_jax.data.transforms import augment
from evit_jax.data.transforms.geometry import CropWindow

MAX_CLASSES = 10  # number of classes stored for a token


class TokenTargets(NamedTuple):
    """Computes the targets of one image, as rows of a batch.

    A target over L classes has `value` at the classes `index`, plus (1 - sum of value) / L at every class. A value is
    thus the difference to a class without one. The target sums to 1. Padding has the value 0.
    """

    maps: LabelMaps
    grid: int  # number of tokens along a side

    @property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype of each row: token_value, token_index [P, K], label_value, label_index [K]."""
        kept = min(MAX_CLASSES, self.maps.metadata.classes)
        dtypes = {'value': np.float32, 'index': np.int32}
        return {f'{kind}_{name}': ((*leading, kept), dtype) for kind, leading in (
            ('token', (self.grid**2,)), ('label', ())) for name, dtype in dtypes.items()}

    def rows(self, example: str, window: CropWindow) -> dict[str, np.ndarray]:
        """Returns the rows for the window of an example.

        Raises:
          ValueError: the example has no map.
        """
        classes, dense = _dense(self.maps[example])
        tokens, moved = _follow_ops(_aligned(dense, window, self.grid), window)
        label = tokens.mean(axis=(0, 1), keepdims=True) if moved else _aligned(dense, window, 1)
        rows, total = {}, self.maps.metadata.classes
        for kind, logits in (('token', tokens), ('label', label)):
            value, column = sparse_softmax(logits.reshape(-1, len(classes)), total, min(MAX_CLASSES, total))
            rows |= {f'{kind}_value': value, f'{kind}_index': np.append(classes, 0).astype(np.int32)[column]}
        return {name: rows[name].reshape(shape) for name, (shape, _) in self.shapes.items()}


def _dense(label_map: LabelMap) -> tuple[np.ndarray, np.ndarray]:
    """Returns the U classes in a map, and their values [G, G, U]; 0 in cells that do not store the class."""
    classes, column = np.unique(label_map.index, return_inverse=True)
    top, side, _ = label_map.index.shape
    dense = np.zeros((side, side, len(classes)), np.float32)
    np.put_along_axis(dense, column.reshape(top, side, side).transpose(1, 2, 0), label_map.value.transpose(1, 2, 0), -1)
    return classes, dense


def _aligned(dense, window, grid):
    """Resamples the map to a grid over the window, [grid, grid, U]."""
    cells = dense.shape[0]
    rows = axis_weights(window.top, window.bottom, cells, grid)
    if window.mirrored:
        columns = axis_weights(1 - window.right, 1 - window.left, cells, grid)[:, ::-1]
    else:
        columns = axis_weights(window.left, window.right, cells, grid)
    return align(dense, rows, columns)


def _follow_ops(tokens, window):
    """Moves the tokens like the operations of RandAugment move their centres; 0 from outside the image.

    Returns:
      The tokens, and whether any of them moved.
    """
    grid = len(tokens)
    centres = (np.arange(grid) + 0.5) / grid
    x, y, inside = augment.source_positions(*np.meshgrid(centres, centres), window.ops)
    columns, rows = (np.clip(at * grid, 0, grid - 1).astype(int) for at in (x, y))
    positions = rows * grid + columns
    if inside.all() and np.array_equal(positions.ravel(), np.arange(grid * grid)):
        return tokens, False
    return np.where(inside[..., None], tokens[rows, columns], 0), True


def sparse_softmax(logits: np.ndarray, total: int, kept: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes a softmax over `total` classes, of which U have logits and the others 0, for the `kept` likeliest.

    Args:
      logits: float32 [N, U].
      total: number of classes.
      kept: number of classes to return.

    Returns:
      value, column: [N, kept], best first: the difference to the mean probability of the classes that are not returned,
      and the column of the class in `logits`. Padding has the value 0 and the column U.
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
