"""Which patches were merged into one token: each group in its mean colour, with a line around it."""

import numpy as np

from evit_jax.viz.page import enlarged

LINE = (255, 255, 255)  # around groups of several patches


def groups_filled(image: np.ndarray, token_of_patch: np.ndarray, patch_size: int, scale: int = 1) -> np.ndarray:
    """Fills every group of patches with its mean colour; a patch that is alone in its token stays as it is.

    Args:
      image: [H, W, 3] uint8.
      home: [N] int, of each patch, row by row, the number of the token that it is in; all -1 are one group.
      patch_size: pixels a side.
      scale: pixels of the picture for one of the image; the lines are one wide.

    Raises:
      ValueError: there are not as many patches.
    """
    rows, columns = image.shape[0] // patch_size, image.shape[1] // patch_size
    token_of_patch = np.asarray(token_of_patch)
    if token_of_patch.shape != (rows * columns,):
        raise ValueError(f'home is of {token_of_patch.size} patches, the image has {rows}x{columns}')
    _, group, size = np.unique(token_of_patch, return_inverse=True, return_counts=True)
    of_pixel = enlarged(group.reshape(rows, columns), patch_size)  # [H, W]
    sums = [np.bincount(of_pixel.ravel(), image[..., channel].ravel()) for channel in range(3)]
    means = np.rint(np.stack(sums, axis=1) / (size[:, None] * patch_size**2)).astype(np.uint8)
    alone = size == 1
    picture = np.array(enlarged(np.where(alone[of_pixel][..., None], image, means[of_pixel]), scale))
    at = enlarged(of_pixel, scale)
    line = np.zeros(at.shape, bool)  # on the upper or left side of a border
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        line[here] |= (at[here] != at[there]) & ~(alone[at[here]] & alone[at[there]])
    picture[line] = LINE
    return picture


def tokens_of(token_of_patch: np.ndarray) -> int:
    """How many tokens hold the patches."""
    return len(set(np.asarray(token_of_patch).tolist()) - {-1})
