"""Which patches a vision transformer that drops tokens keeps: the others fade away, stage by stage."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.groups import groups_filled, tokens_of
from evit_jax.viz.page import DARK, GREY, PAGE, draw_page, enlarged, setup

DIM = 0.25               # share of a dropped patch's contrast that is left
FADED = (238, 240, 244)  # what dropped patches fade to
EDGE = (150, 156, 166)   # between kept and dropped patches, for images as light as `FADED`
SIDE = 130               # pixels that a small image is enlarged to, about
RIGHT, WRONG = (22, 128, 61), (200, 30, 40)


def dim_dropped(image: np.ndarray, kept_ids: np.ndarray, patch_size: int, dim: float = DIM) -> np.ndarray:
    """Fades the patches that are not kept to light grey; the others stay as they are, to the pixel.

    Args:
      image: [H, W, 3] uint8.
      kept_ids: [K] int, row by row in the grid of patches. Negative ids are fused tokens, which have no place.
      patch_size: pixels a side.
      dim: share of a dropped patch's contrast that is left, in grey: 0 blanks it, 1 takes only its colour.

    Raises:
      ValueError: the image is not uint8 [H, W, 3] or not a whole number of patches; an id is outside the grid.
    """
    kept = _kept_pixels(image, kept_ids, patch_size)
    luma = image @ np.array([0.299, 0.587, 0.114])  # [H, W]
    faded = np.rint(dim * luma[..., None] + (1 - dim) * np.array(FADED)).astype(np.uint8)
    return np.where(kept[..., None], image, faded)


def kept_row(image: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *,
             token_of_patch: Sequence[np.ndarray] | None = None, dim: float = DIM, scale: int = 1,
             gap: int = 8) -> np.ndarray:
    """The image, and beside it what each stage keeps, with a thin line around it.

    Args:
      image: [H, W, 3] uint8.
      kept: for each stage [K] int, see `dim_dropped`.
      home: for each stage [N] int, see `groups_filled`, which is drawn in place of `kept` then.
      scale: pixels of the row for one of the image.
      gap: pixels between two pictures.

    Returns:
      [scale * H, (stages + 1) * scale * W + stages * gap, 3] uint8.
    """
    space = np.full((image.shape[0] * scale, gap, 3), PAGE, np.uint8)
    parts = [enlarged(image, scale)]
    for stage, ids in enumerate(kept):
        if token_of_patch is not None:
            parts += [space, groups_filled(image, token_of_patch[stage], patch_size, scale)]
            continue
        picture = enlarged(dim_dropped(image, ids, patch_size, dim), scale)
        inside = np.pad(enlarged(_kept_pixels(image, ids, patch_size), scale), 1, mode='edge')
        beside = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
        picture[beside & ~inside[1:-1, 1:-1]] = EDGE  # on dropped patches only
        parts += [space, picture]
    return np.concatenate(parts, axis=1)


def kept_grid(images: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *,
              token_of_patch: Sequence[np.ndarray] | None = None,
              predictions: Sequence[int] | None = None, truths: Sequence[int] | None = None,
              class_names: Sequence[str] | None = None, titles: Sequence[str] | None = None, heading: str | None = None,
              columns: int = 2, scale: int | None = None, dim: float = DIM) -> Image.Image:
    """A page of examples: each image with what every stage keeps, and below it the prediction and the truth.

    The prediction is green where it is right, red where it is wrong, black where no truth is given.

    Args:
      images: [B, H, W, 3] uint8.
      kept: for each stage [B, K] int, see `dim_dropped`; rows of fewer patches are filled up with negative ids.
      home: for each stage [B, N] int, of a reducer that merges: the groups are drawn, see `groups_filled`.
      predictions, truths: [B] class numbers; either may be missing.
      class_names: by class number; None shows the number.
      titles: of the stages; None names them 'stage 1', 'stage 2', ...
      heading: a line above everything.
      columns: examples side by side.
      scale: pixels of the page for one of the image; None makes small images about `SIDE` pixels high.

    Raises:
      ValueError: lengths that do not fit together, and what `dim_dropped` raises.
    """
    images, kept = np.asarray(images), [np.asarray(ids) for ids in kept]
    titles = titles or [f'stage {number}' for number in range(1, len(kept) + 1)]
    _check_lengths(images, kept, titles, predictions, truths)
    patches = math.prod(_grid(images[0], patch_size))
    headers = [('image', f'{patches} patches')]
    headers += [(title, _kept_of(ids, patches)) for title, ids in zip(titles, kept)] if token_of_patch is None else [
        (title, _merged_into(of_stage, patches)) for title, of_stage in zip(titles, token_of_patch, strict=True)]
    scale = scale or max(1, round(SIDE / images.shape[1]))
    layout = setup(images.shape[1] * scale, images.shape[2] * scale, len(headers), min(columns, len(images)))
    rows = [kept_row(image, [ids[number] for ids in kept], patch_size, dim=dim, scale=scale, gap=layout.gap,
                     token_of_patch=token_of_patch and [of_stage[number] for of_stage in token_of_patch])
            for number, image in enumerate(images)]
    captions = None
    if predictions is not None or truths is not None:
        nothing = [None] * len(images)
        pairs = zip(nothing if predictions is None else predictions, nothing if truths is None else truths)
        captions = [_caption(*pair, class_names) for pair in pairs]
    return draw_page(layout, headers, rows, captions, heading)


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


def _kept_of(ids: np.ndarray, patches: int) -> str:
    """'45 of 64, 70 %', or with the least and the most where images differ; fused tokens do not count."""
    least, most = (round(x) for x in ((ids >= 0).sum(1).min(), (ids >= 0).sum(1).max()))
    kept = f'{least}' if least == most else f'{least} to {most}'
    return f'{kept} of {patches}, {100 * (ids >= 0).sum() / (len(ids) * patches):.0f} %'


def _merged_into(token_of_patch: np.ndarray, patches: int) -> str:
    """'45 tokens, 70 %'; all images have as many."""
    tokens = tokens_of(token_of_patch[0])
    return f'{tokens} tokens, {100 * tokens / patches:.0f} %'


def _kept_pixels(image: np.ndarray, kept_ids: np.ndarray, patch_size: int) -> np.ndarray:
    """[H, W] bool."""
    rows, columns = _grid(image, patch_size)
    ids = np.asarray(kept_ids, np.int64)
    if (outside := ids[ids >= rows * columns]).size:
        raise ValueError(f'patch {outside[0]} is outside the {rows}x{columns} grid, 0 to {rows * columns - 1}')
    kept = np.zeros(rows * columns, bool)
    kept[ids[ids >= 0]] = True
    return enlarged(kept.reshape(rows, columns), patch_size)


def _grid(image: np.ndarray, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f'the image is {image.dtype} {list(image.shape)}: give uint8 [H, W, 3]')
    height, width = image.shape[:2]
    if height % patch_size or width % patch_size:
        raise ValueError(f'an image of {height}x{width} pixels is not a whole number of patches of {patch_size}')
    return height // patch_size, width // patch_size


def _check_lengths(images, kept, titles, predictions, truths):
    if not len(images):
        raise ValueError('there is no image to draw')
    if len(titles) != len(kept):
        raise ValueError(f'{len(titles)} titles for {len(kept)} stages')
    lengths = {f'kept[{stage}]': ids for stage, ids in enumerate(kept)} | {'predictions': predictions, 'truths': truths}
    for what, values in lengths.items():
        if values is not None and len(values) != len(images):
            raise ValueError(f'{what} has {len(values)} rows for {len(images)} images')
