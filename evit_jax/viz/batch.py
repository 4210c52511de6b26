"""What a model sees: images as they are stored, as they come out of the augmentation, and as they are mixed."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.page import DARK, GREY, PAGE, draw_page, setup


def batch_page(stored: Sequence[np.ndarray], augmented: np.ndarray, mixed: np.ndarray | None = None, *,
               names: Sequence[str], ids: Sequence[str], heading: str) -> Image.Image:
    """A page with a row for each image: as stored, some augmented copies, and what these are in a mixed batch.

    Args:
      stored: uint8 [H, W, 3] of any size; shown as a whole.
      augmented: [B, C, S, S, 3] uint8, copies of each image.
      mixed: the same after mixing; each copy then is a blend with another image's.
      names: classes of the images.
      ids: written with the stored size below the row.
      heading: a line above everything.
    """
    count, copies, size = augmented.shape[:3]
    headers = [('stored', 'whole, shrunk to fit')]
    headers += [('augmented', f'copy {number}') for number in range(1, copies + 1)]
    shown = [[_fitted(image, size), *row] for image, row in zip(stored, augmented, strict=True)]
    if mixed is not None:
        headers += [('mixed', f'copy {number}') for number in range(1, copies + 1)]
        shown = [pictures + [*row] for pictures, row in zip(shown, mixed, strict=True)]
    layout = setup(size, size, len(headers))
    space = np.full((size, layout.gap, 3), PAGE, np.uint8)
    rows = [np.concatenate([part for picture in pictures for part in (space, picture)][1:], axis=1)
            for pictures in shown]
    captions = [[(name, DARK), (f'{image.shape[1]} x {image.shape[0]}  {said}', GREY)]
                for name, image, said in zip(names, stored, ids)]
    return draw_page(layout, headers, rows, captions, heading)


def _fitted(image: np.ndarray, size: int) -> np.ndarray:
    """The whole image in a square, on the page's colour."""
    height, width = image.shape[:2]
    scale = size / max(height, width)
    shrunk = Image.fromarray(image).resize((max(round(width * scale), 1), max(round(height * scale), 1)),
                                           Image.Resampling.BICUBIC)
    square = Image.new('RGB', (size, size), PAGE)
    square.paste(shrunk, ((size - shrunk.width) // 2, (size - shrunk.height) // 2))
    return np.asarray(square)
