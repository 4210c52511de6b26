"""Which patches a vision transformer that drops tokens keeps: the others fade away, stage by stage."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

DIM = 0.25               # share of a dropped patch's contrast that is left
FADED = (238, 240, 244)  # what dropped patches fade to
EDGE = (150, 156, 166)   # between kept and dropped patches, for images as light as `FADED`
SIDE = 130               # pixels that a small image is enlarged to, about
PAGE = (255, 255, 255)
FRAME = (221, 224, 229)  # around every picture, whose dropped border would run into the page
DARK, GREY = (31, 35, 41), (124, 131, 141)
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


def kept_row(image: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *, dim: float = DIM, scale: int = 1,
             gap: int = 8) -> np.ndarray:
    """The image, and beside it what each stage keeps, with a thin line around it.

    Args:
      image: [H, W, 3] uint8.
      kept: for each stage [K] int, see `dim_dropped`.
      scale: pixels of the row for one of the image.
      gap: pixels between two pictures.

    Returns:
      [scale * H, (stages + 1) * scale * W + stages * gap, 3] uint8.
    """
    space = np.full((image.shape[0] * scale, gap, 3), PAGE, np.uint8)
    parts = [_enlarged(image, scale)]
    for ids in kept:
        picture = _enlarged(dim_dropped(image, ids, patch_size, dim), scale)
        inside = np.pad(_enlarged(_kept_pixels(image, ids, patch_size), scale), 1, mode='edge')
        beside = inside[:-2, 1:-1] | inside[2:, 1:-1] | inside[1:-1, :-2] | inside[1:-1, 2:]
        picture[beside & ~inside[1:-1, 1:-1]] = EDGE  # on dropped patches only
        parts += [space, picture]
    return np.concatenate(parts, axis=1)


def kept_grid(images: np.ndarray, kept: Sequence[np.ndarray], patch_size: int, *,
              predictions: Sequence[int] | None = None, truths: Sequence[int] | None = None,
              class_names: Sequence[str] | None = None, titles: Sequence[str] | None = None, heading: str | None = None,
              columns: int = 2, scale: int | None = None, dim: float = DIM) -> Image.Image:
    """A page of examples: each image with what every stage keeps, and below it the prediction and the truth.

    The prediction is green where it is right, red where it is wrong, black where no truth is given.

    Args:
      images: [B, H, W, 3] uint8.
      kept: for each stage [B, K] int, see `dim_dropped`; rows of fewer patches are filled up with negative ids.
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
    headers += [(title, _kept_of(ids, patches)) for title, ids in zip(titles, kept)]
    scale = scale or max(1, round(SIDE / images.shape[1]))
    layout = _layout(images.shape[1] * scale, images.shape[2] * scale, len(headers), min(columns, len(images)))
    rows = [kept_row(image, [ids[number] for ids in kept], patch_size, dim=dim, scale=scale, gap=layout.gap)
            for number, image in enumerate(images)]
    captions = None
    if predictions is not None or truths is not None:
        nothing = [None] * len(images)
        pairs = zip(nothing if predictions is None else predictions, nothing if truths is None else truths)
        captions = [_caption(*pair, class_names) for pair in pairs]
    return _draw_page(layout, headers, rows, captions, heading)


class _Layout(NamedTuple):
    """Sizes and distances on the page, in pixels."""

    height: int    # of a picture
    width: int
    pictures: int  # of an example
    columns: int   # examples side by side
    gap: int       # between two pictures of an example
    gutter: int    # between two examples
    margin: int
    text: int      # size of the letters
    line: int      # from one line of text to the next

    @property
    def example(self) -> int:
        """Width of an example."""
        return self.pictures * (self.width + self.gap) - self.gap

    def left(self, column: int) -> int:
        return self.margin + column * (self.example + self.gutter)


def _layout(height: int, width: int, pictures: int, columns: int) -> _Layout:
    text = max(11, round(7 + 0.05 * height))
    return _Layout(height, width, pictures, columns, gap=round(0.07 * height) + 1, gutter=round(0.36 * height),
                   margin=round(0.3 * height), text=text, line=round(1.4 * text))


def _draw_page(layout: _Layout, headers: Sequence[tuple[str, str]], rows: Sequence[np.ndarray],
               captions: Sequence[list[tuple[str, tuple]]] | None, heading: str | None) -> Image.Image:
    line = layout.line
    top = layout.margin + (round(2.3 * line) if heading else 0)
    body = top + round(2.4 * line)
    step = layout.height + (round(2.6 * line) if captions else line)
    bottom = body + -(-len(rows) // layout.columns) * step - line
    page = Image.new('RGB', (layout.left(layout.columns) - layout.gutter + layout.margin, bottom + layout.margin), PAGE)
    draw = ImageDraw.Draw(page)
    if heading:
        _write(page, layout.margin, layout.margin, heading, DARK, 1.5 * layout.text, page.width - 2 * layout.margin)
    for column in range(layout.columns):
        _draw_headers(page, layout, layout.left(column), top, headers)
    for number, row in enumerate(rows):
        x, y = layout.left(number % layout.columns), body + number // layout.columns * step
        page.paste(Image.fromarray(row), (x, y))
        for picture in range(layout.pictures):
            left = x + picture * (layout.width + layout.gap)
            draw.rectangle((left - 1, y - 1, left + layout.width, y + layout.height), outline=FRAME)
        if captions:
            _draw_caption(page, layout, x, y + layout.height + round(0.4 * line), captions[number])
    return page


def _draw_headers(page: Image.Image, layout: _Layout, x: int, y: int, headers: Sequence[tuple[str, str]]) -> None:
    for picture, (title, count) in enumerate(headers):
        left = x + picture * (layout.width + layout.gap)
        _write(page, left, y, title, DARK, layout.text, layout.width)
        _write(page, left, y + layout.line, count, GREY, layout.text, layout.width)


def _draw_caption(page: Image.Image, layout: _Layout, x: int, y: int, parts: Sequence[tuple[str, tuple]]) -> None:
    """Writes the parts one after the other, each in its share of the example's width, the last in what is left."""
    width = (layout.example - (len(parts) - 1) * layout.text) // len(parts)
    end = x + layout.example
    for number, (text, colour) in enumerate(parts, 1):
        limit = width if number < len(parts) else end - x
        x += _write(page, x, y, text, colour, 1.1 * layout.text, limit) + layout.text


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


def _write(page: Image.Image, x: int, y: int, text: str, colour: tuple, size: float, width: int) -> int:
    """Writes one line, shortened to `width` pixels; returns how wide it is.

    The letters are drawn four times as large and scaled down: at their own size Pillow sets them on whole pixels, which
    spaces small text unevenly.
    """
    font = _font(round(4 * size))
    if font.getlength(text) > 4 * width:
        while text and font.getlength(text + '…') > 4 * width:
            text = text[:-1]
        text = text.rstrip() + '…'
    wide = math.ceil(font.getlength(text) / 4)
    mask = Image.new('L', (4 * wide, 4 * math.ceil(1.4 * size)))
    ImageDraw.Draw(mask).text((0, 0), text, 255, font)
    page.paste(colour, (x, y), mask.resize((mask.width // 4, mask.height // 4), Image.Resampling.BOX))
    return wide


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _enlarged(image: np.ndarray, scale: int) -> np.ndarray:
    return image.repeat(scale, 0).repeat(scale, 1)


def _kept_pixels(image: np.ndarray, kept_ids: np.ndarray, patch_size: int) -> np.ndarray:
    """[H, W] bool."""
    rows, columns = _grid(image, patch_size)
    ids = np.asarray(kept_ids, np.int64)
    if (outside := ids[ids >= rows * columns]).size:
        raise ValueError(f'patch {outside[0]} is outside the {rows}x{columns} grid, 0 to {rows * columns - 1}')
    kept = np.zeros(rows * columns, bool)
    kept[ids[ids >= 0]] = True
    return _enlarged(kept.reshape(rows, columns), patch_size)


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
