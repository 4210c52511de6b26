"""Draws a page of training images: as stored, after augmentation, and after mixing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.kept import side_by_side
from evit_jax.viz.page import DARK, GREY, PAGE, Layout, draw_page


def batch_page(stored: Sequence[np.ndarray], augmented: np.ndarray, mixed: np.ndarray | None = None, *,
               names: Sequence[str], ids: Sequence[str], heading: str) -> Image.Image:
    """Draws a page with one row per image: the stored image, its augmented copies, and these copies after mixing.

    Args:
      stored: one array uint8 [H, W, 3] per image, of any size. The whole image is shown.
      augmented: [B, C, S, S, 3] uint8, C copies of each image.
      mixed: the copies after mixing with copies of other images; same shape.
      names: class names of the images.
      ids: ids of the images; written below the row, with the stored size.
      heading: line of text at the top of the page.
    """
    count, copies, size = augmented.shape[:3]
    headers = [('stored', 'whole, shrunk to fit')]
    headers += [('augmented', f'copy {number}') for number in range(1, copies + 1)]
    shown = [[_fitted(image, size), *row] for image, row in zip(stored, augmented, strict=True)]
    if mixed is not None:
        headers += [('mixed', f'copy {number}') for number in range(1, copies + 1)]
        shown = [pictures + [*row] for pictures, row in zip(shown, mixed, strict=True)]
    layout = Layout.of_pictures(size, size, len(headers))
    rows = [side_by_side(pictures, layout.gap) for pictures in shown]
    captions = [[(name, DARK), (f'{image.shape[1]} x {image.shape[0]}  {image_id}', GREY)]
                for name, image, image_id in zip(names, stored, ids)]
    return draw_page(layout, headers, rows, captions, heading)


def _fitted(image: np.ndarray, size: int) -> np.ndarray:
    """Returns the whole image, scaled to fit a square that has the colour of the page."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    shrunk = Image.fromarray(image).resize((max(round(width * scale), 1), max(round(height * scale), 1)),
                                           Image.Resampling.BICUBIC)
    square = Image.new('RGB', (size, size), PAGE)
    square.paste(shrunk, ((size - shrunk.width) // 2, (size - shrunk.height) // 2))
    return np.asarray(square)
