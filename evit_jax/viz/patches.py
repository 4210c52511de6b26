"""Draws tokens on an image: hidden patches fade, and merged patches get their mean colour. Also draws heat maps."""

import matplotlib
import numpy as np

DIM = 0.25               # contrast of a hidden patch, as a fraction of its contrast in the image
FADED = (238, 240, 244)  # colour that hidden patches fade towards
EDGE = (150, 156, 166)   # line between shown and hidden patches; needed if an image is as light as `FADED`
LINE = (255, 255, 255)   # line around merged patches
HEAT_COLOURS = np.rint(255 * matplotlib.colormaps['inferno'](np.linspace(0.06, 0.98, 64))[:, :3]).astype(np.uint8)
_HEAT = 0.78             # weight of the heat colour in a patch; the grey image has the remaining weight
_GREY_WEIGHTS = np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601


def patch_groups(kept_ids: np.ndarray, token_of_patch: np.ndarray | None, patches: int) -> np.ndarray:
    """Returns the index of the token that shows each patch, [N] int; -1 for a hidden patch.

    A patch is shown if a patch token holds it. It is hidden if a fused token or no token holds it. Patches with the
    same index are merged into one token.

    Args:
      kept_ids: [K] int, the patch id of each token; negative for fused tokens and for padding.
      token_of_patch: [N] int, index of the token that holds each patch, -1 if no token holds it. None if every token
        holds only the patch of its id.
      patches: number of patches of the image, N.

    Raises:
      ValueError: an id or an index is out of range.
    """
    kept_ids = np.asarray(kept_ids, np.int64)
    if (outside := kept_ids[kept_ids >= patches]).size:
        raise ValueError(f'patch {outside[0]} is outside the grid of {patches} patches, 0 to {patches - 1}')
    if token_of_patch is None:
        groups = np.full(patches, -1)
        groups[kept_ids[kept_ids >= 0]] = np.flatnonzero(kept_ids >= 0)
        return groups
    groups = np.asarray(token_of_patch, np.int64)
    if groups.shape != (patches,):
        raise ValueError(f'token_of_patch has {groups.size} patches, the image has {patches}')
    if groups.max() >= len(kept_ids):
        raise ValueError(f'token_of_patch names token {groups.max()} of {len(kept_ids)}')
    shown = np.append(kept_ids >= 0, False)[groups]  # -1 reads the appended element
    return np.where(shown, groups, -1)


def num_tokens(groups: np.ndarray) -> int:
    """Returns the number of tokens that show patches."""
    return len(np.unique(groups[groups >= 0]))


def has_merged(groups: np.ndarray) -> bool:
    """Returns True if a token shows several patches."""
    return num_tokens(groups) < (groups >= 0).sum()


def draw_tokens(image: np.ndarray, kept_ids: np.ndarray, patch_size: int, *, token_of_patch: np.ndarray | None = None,
                dim: float = DIM, faded: tuple[int, int, int] = FADED, scale: int = 1) -> np.ndarray:
    """Draws the tokens of a stage. Hidden patches fade to one colour; merged patches get their mean colour and a line.

    A patch that is alone in its token is unchanged. See `patch_groups` for the definition of hidden and merged patches.

    Args:
      image: [H, W, 3] uint8.
      kept_ids, token_of_patch: see `patch_groups`; patches are numbered row by row.
      patch_size: side of a patch in pixels.
      dim: contrast of a hidden patch as a fraction of its contrast in the image; 0 makes it blank. Colour is removed.
      faded: colour that hidden patches fade towards.
      scale: factor by which the image is enlarged. Lines are one pixel wide at any scale.

    Returns:
      [scale * H, scale * W, 3] uint8.

    Raises:
      ValueError: the image is not uint8 [H, W, 3] or not a whole number of patches, or an id or index is out of range.
    """
    rows, columns = grid(image, patch_size)
    groups = patch_groups(kept_ids, token_of_patch, rows * columns)
    of_pixel = enlarge(groups.reshape(rows, columns), patch_size)  # [H, W]
    size = np.bincount(groups + 1, minlength=2)  # patches in each group, hidden ones first
    merged = (of_pixel >= 0) & (size[of_pixel + 1] > 1)
    sums = [np.bincount(of_pixel.ravel() + 1, image[..., channel].ravel(), len(size)) for channel in range(3)]
    means = np.rint(np.stack(sums, axis=1) / np.maximum(size * patch_size**2, 1)[:, None]).astype(np.uint8)
    hidden = np.rint(dim * (image @ _GREY_WEIGHTS)[..., None] + (1 - dim) * np.array(faded)).astype(np.uint8)
    picture = np.where(merged[..., None], means[of_pixel + 1], np.where((of_pixel >= 0)[..., None], image, hidden))
    return _outlined(np.array(enlarge(picture, scale)), enlarge(of_pixel, scale), enlarge(merged, scale))


def heat_map(image: np.ndarray, values: np.ndarray, patch_size: int) -> np.ndarray:
    """Colours each patch by its value, on a scale from 0 to the largest value. A patch with the value NaN fades.

    Args:
      image: [H, W, 3] uint8.
      values: [N] float, row by row in the grid of patches.
      patch_size: side of a patch in pixels.

    Returns:
      [H, W, 3] uint8.
    """
    columns = image.shape[1] // patch_size
    grey = (image @ _GREY_WEIGHTS)[..., None]  # [H, W, 1]
    peak = np.nanmax(values, initial=0) or 1
    level = np.rint(np.nan_to_num(values) / peak * (len(HEAT_COLOURS) - 1)).astype(int)

    def to_pixels(array):
        return enlarge(array.reshape(-1, columns, *array.shape[1:]), patch_size)

    heat = _HEAT * to_pixels(HEAT_COLOURS[level]) + (1 - _HEAT) * grey
    faded = 0.15 * grey + 0.85 * 240
    return np.rint(np.where(to_pixels(np.isnan(values))[..., None], faded, heat)).astype(np.uint8)


def enlarge(array: np.ndarray, scale: int) -> np.ndarray:
    """Repeats every pixel `scale` times in both directions."""
    return array.repeat(scale, 0).repeat(scale, 1)


def grid(image: np.ndarray, patch_size: int) -> tuple[int, int]:
    """Returns the rows and columns of patches.

    Raises:
      ValueError: the image is not uint8 [H, W, 3], or not a whole number of patches.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'the image is {image.dtype} {list(image.shape)}: give uint8 [H, W, 3]')
    height, width = image.shape[:2]
    if height % patch_size or width % patch_size:
        raise ValueError(f'an image of {height}x{width} pixels is not a whole number of patches of {patch_size}')
    return height // patch_size, width // patch_size


def _outlined(picture, of_pixel, merged):
    """Draws EDGE on hidden pixels next to shown ones, and LINE between tokens where one side is merged.

    LINE is one pixel wide and lies above or left of the border.
    """
    shown = np.pad(of_pixel >= 0, 1, mode='edge')
    is_next_to_shown = shown[:-2, 1:-1] | shown[2:, 1:-1] | shown[1:-1, :-2] | shown[1:-1, 2:]
    picture[is_next_to_shown & (of_pixel < 0)] = EDGE
    line = np.zeros(of_pixel.shape, bool)
    for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        line[here] |= (of_pixel[here] != of_pixel[there]) & (merged[here] | merged[there])
    picture[line] = LINE
    return picture
