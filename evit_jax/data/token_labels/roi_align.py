"""RoI-align: resamples a map on a coarse grid to another grid over a rectangle of the image.

Each output cell is the mean of evenly spaced samples, interpolated bilinearly between the centres of the map's cells.
The weights of rows and columns are separable, so two small matrix products suffice for any number of channels.

Source: torchvision.ops.roi_align as called by zihangJiang/TokenLabeling (`get_label` of tlt/data/mixup.py), with
aligned=False and a box shifted by half a cell. The shift aligns the box; aligned=False makes a box at least one cell
wide. A departure: the reference passes the box as (top, left, bottom, right) to a function that expects (left, top,
right, bottom), so it crops the map at the transposed position. Here the axes have the correct order.
"""

import math

import numpy as np


def axis_weights(begin: float, end: float, cells: int, bins: int) -> np.ndarray:
    """Returns the weight of each cell of an axis in each bin.

    Args:
      begin, end: interval that is divided into bins, as fractions of the axis.
      cells: number of cells of the map along the axis.
      bins: number of bins.

    Returns:
      float32 [bins, cells]. The row of a bin that lies within the map sums to 1.
    """
    first = begin * cells - 0.5  # the centre of cell i has coordinate i
    step = max((end - begin) * cells, 1.0) / bins
    count = math.ceil(step)  # samples per bin
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
    """Applies weights of rows [P, H] and columns [Q, W] to a map, float32 [H, W, C]; returns [P, Q, C]."""
    return columns @ np.tensordot(rows, dense, 1)  # [Q, W] @ [P, W, C]
