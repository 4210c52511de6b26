"""Draws a page of images with the patches that a model keeps or merges at each stage."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.page import DARK, GREY, PAGE, Layout, draw_page
from evit_jax.viz.patches import draw_tokens, enlarge, grid, has_merged, num_tokens, patch_groups

MIN_HEIGHT = 130  # height in pixels; smaller images are enlarged to about this height
RIGHT, WRONG = (22, 128, 61), (200, 30, 40)


def kept_row(image: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *,
             token_of_patch: Sequence[np.ndarray | None] | None = None, scale: int = 1, gap: int = 8) -> np.ndarray:
    """Draws a row of pictures: the image, and the tokens of each stage.

    Args:
      image: [H, W, 3] uint8.
      kept: one array [K] int per stage; see `patches.patch_groups`.
      token_of_patch: one array [N] int or None per stage; see `patches.patch_groups`.
      patch_size: side of a patch in pixels.
      scale: factor by which the image is enlarged.
      gap: pixels between two pictures.

    Returns:
      [scale * H, (stages + 1) * scale * W + stages * gap, 3] uint8.
    """
    return side_by_side([enlarge(image, scale)] + [
        draw_tokens(image, ids, patch_size, token_of_patch=index, scale=scale)
        for ids, index in zip(kept, token_of_patch or [None] * len(kept), strict=True)], gap)


def side_by_side(pictures: Sequence[np.ndarray], gap: int) -> np.ndarray:
    """Joins pictures of equal height in a row. The gaps between them have the colour of the page."""
    space = np.full((len(pictures[0]), gap, 3), PAGE, np.uint8)
    return np.concatenate([part for picture in pictures for part in (space, picture)][1:], axis=1)


def kept_grid(images: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *,
              token_of_patch: Sequence[np.ndarray] | None = None, predictions: Sequence[int] | None = None,
              truths: Sequence[int] | None = None, class_names: Sequence[str] | None = None,
              columns: int = 2) -> Image.Image:
    """Draws a page of examples: image, tokens of every stage, and a caption with prediction and true class.

    The prediction is green if it is right, red if it is wrong, and black if the true class is unknown.

    Args:
      images: [B, H, W, 3] uint8.
      kept: one array [B, K] int per stage; see `patches.patch_groups`. Shorter rows are padded with negative ids.
      patch_size: side of a patch in pixels.
      token_of_patch: one array [B, N] int per stage; see `patches.patch_groups`.
      predictions, truths: [B] class numbers, or None.
      class_names: names by class number; None writes the number.
      columns: number of examples side by side.

    Raises:
      ValueError: lengths do not match, or an argument is invalid for `patches.draw_tokens`.
    """
    images, kept = np.asarray(images), [np.asarray(ids) for ids in kept]
    _check_lengths(images, kept, token_of_patch, predictions, truths)
    rows, grid_columns = grid(images[0], patch_size)
    patches = rows * grid_columns
    headers = [('image', f'{patches} patches')]
    for stage, ids in enumerate(kept):
        indices = [None] * len(images) if token_of_patch is None else token_of_patch[stage]
        groups = [patch_groups(*of_image, patches) for of_image in zip(ids, indices, strict=True)]
        headers.append((f'stage {stage + 1}', _count_text(np.stack(groups))))
    scale = max(1, round(MIN_HEIGHT / images.shape[1]))
    layout = Layout.of_pictures(images.shape[1] * scale, images.shape[2] * scale, len(headers),
                                min(columns, len(images)))
    rows = [kept_row(image, [ids[number] for ids in kept], patch_size, scale=scale, gap=layout.gap,
                     token_of_patch=token_of_patch and [indices[number] for indices in token_of_patch])
            for number, image in enumerate(images)]
    captions = None
    if predictions is not None or truths is not None:
        nothing = [None] * len(images)
        pairs = zip(nothing if predictions is None else predictions, nothing if truths is None else truths)
        captions = [_caption(*pair, class_names) for pair in pairs]
    return draw_page(layout, headers, rows, captions)


def _caption(prediction: int | None, truth: int | None, names: Sequence[str] | None) -> list[tuple[str, tuple]]:
    def name(label):
        return str(label) if names is None else names[label]

    if prediction is None:
        return [(f'truth {name(truth)}', DARK)]
    if truth is None:
        return [(f'predicted {name(prediction)}', DARK)]
    right = prediction == truth
    return [(f'predicted {name(prediction)}', RIGHT if right else WRONG),
            (f'truth {name(truth)}', GREY if right else DARK)]


def _count_text(groups: np.ndarray) -> str:
    """Describes the number of tokens: '45 of 64, 70 %', or '45 tokens, 70 %' if patches are merged.

    If the images differ, the number is a range: '1 to 2 of 16'.

    Args:
      groups: [B, N], see `patches.patch_groups`.
    """
    counts, patches = [num_tokens(of_image) for of_image in groups], groups.shape[1]
    least, most = min(counts), max(counts)
    text = f'{least}' if least == most else f'{least} to {most}'
    text += ' tokens' if any(map(has_merged, groups)) else f' of {patches}'
    return f'{text}, {100 * sum(counts) / groups.size:.0f} %'


def _check_lengths(images, kept, token_of_patch, predictions, truths):
    if not len(images):
        raise ValueError('there is no image to draw')
    if token_of_patch is not None and len(token_of_patch) != len(kept):
        raise ValueError(f'token_of_patch has {len(token_of_patch)} stages, kept has {len(kept)}')
    lengths = {f'kept[{stage}]': ids for stage, ids in enumerate(kept)} | {'predictions': predictions, 'truths': truths}
    for name, values in lengths.items():
        if values is not None and len(values) != len(images):
            raise ValueError(f'{name} has {len(values)} rows for {len(images)} images')
