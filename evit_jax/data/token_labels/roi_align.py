"""RoI-align: what a map on a coarse grid says of the cells of another grid, laid over a rectangle of the image.

Each new cell is the mean of evenly spread samples, bilinear between the centres of the map's cells. As rows and columns
are weighted apart, two small products do it for any number of channels.

Source: torchvision.ops.roi_align, as zihangJiang/TokenLabeling calls it (`get_label` of tlt/data/mixup.py): with
aligned=False and half a cell taken off the box, which puts the box where it belongs; of aligned=False there remains
that a box is at least one cell wide. Mended is the order of the axes: the reference gives the box as (top, left,
bottom, right) to a function that takes (left, top, right, bottom), so that it crops the map at the transposed place,
while it mirrors it along the right axis.
"""

import math

import numpy as np


def axis_weights(begin: float, end: float, cells: int, bins: int) -> np.ndarray:
    """How much of each cell of an axis is in each bin.

    Args:
      begin, end: of what the bins divide among themselves, as shares of the axis.
      cells: of the map, along this axis.

    Returns:
      [bins, cells] float32; the rows sum to 1, where they lie within the map.
    """
    first = begin * cells - 0.5  # in the map's own coordinates, where cell i has its centre at i
    step = max((end - begin) * cells, 1.0) / bins
    count = math.ceil(step)  # samples of a bin
    at = first + step * (np.arange(bins)[:, None] + (np.arange(count) + 0.5) / count)  # [bins, count]
    share = ((at >= -1) & (at <= cells)) / count
    at = np.clip(at, 0, cells - 1)
    low = at.astype(int)
    high, weights = np.minimum(low + 1, cells - 1), np.zeros((bins, cells))
    rows = np.broadcast_to(np.arange(bins)[:, None], low.shape)
    np.add.at(weights, (rows, low), (1 - (at - low)) * share)
    np.add.at(weights, (rows, high), (at - low) * share)
    return weights.astype(np.float32)


def align(dense: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[H, W, C] float32 under the weights [P, H] of rows and [Q, W] of columns, to [P, Q, C]."""
    return columns @ np.tensordot(rows, dense, 1)  # [Q, W] @ [P, W, C]
