"""Heat maps over the patches of an image."""

import matplotlib
import numpy as np

from evit_jax.viz.page import enlarged

COLOURS = np.rint(255 * matplotlib.colormaps['inferno'](np.linspace(0.06, 0.98, 64))[:, :3]).astype(np.uint8)
VEIL = 0.78  # share of the map's colour in a patch; the rest is the image in grey


def heat_map(image: np.ndarray, values: np.ndarray, patch_size: int) -> np.ndarray:
    """Colours each patch by its value, from 0 to the largest; patches without one (NaN) fade.

    Args:
      image: [H, W, 3] uint8.
      values: [N] float, row by row in the grid of patches.
      patch_size: pixels a side.

    Returns:
      [H, W, 3] uint8.
    """
    columns = image.shape[1] // patch_size
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]  # [H, W, 1]
    peak = np.nanmax(values, initial=0) or 1
    level = np.rint(np.nan_to_num(values) / peak * (len(COLOURS) - 1)).astype(int)

    def over_pixels(of_patches):
        return enlarged(of_patches.reshape(-1, columns, *of_patches.shape[1:]), patch_size)

    warm = VEIL * over_pixels(COLOURS[level]) + (1 - VEIL) * grey
    faded = 0.15 * grey + 0.85 * 240
    return np.rint(np.where(over_pixels(np.isnan(values))[..., None], faded, warm)).astype(np.uint8)
