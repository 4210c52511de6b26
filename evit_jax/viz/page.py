"""Draws a page of examples: rows of pictures of equal size, with titles above and a caption below each row."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAGE = (255, 255, 255)
FRAME = (221, 224, 229)  # line around every picture, because a picture may be as light as the page
DARK, GREY = (31, 35, 41), (124, 131, 141)


class Layout(NamedTuple):
    """Sizes and distances on a page, in pixels."""

    height: int    # height of a picture
    width: int     # width of a picture
    pictures: int  # pictures of an example, side by side
    columns: int   # examples side by side
    gap: int       # space between two pictures of an example
    gutter: int    # space between two examples
    margin: int
    text: int      # font size
    line: int      # distance between lines of text

    @classmethod
    def of_pictures(cls, height: int, width: int, pictures: int, columns: int = 1) -> 'Layout':
        """Returns the layout for pictures of this size. An example has `pictures` pictures; a row, `columns` examples.
        """
        text = max(11, round(7 + 0.05 * height))
        return cls(height, width, pictures, columns, gap=round(0.07 * height) + 1, gutter=round(0.36 * height),
                   margin=round(0.3 * height), text=text, line=round(1.4 * text))

    @property
    def example(self) -> int:
        """Width of an example."""
        return self.pictures * (self.width + self.gap) - self.gap

    def left(self, column: int) -> int:
        """Returns the x coordinate of a column of examples."""
        return self.margin + column * (self.example + self.gutter)


def draw_page(layout: Layout, headers: Sequence[tuple[str, str]], rows: Sequence[np.ndarray],
              captions: Sequence[list[tuple[str, tuple]]] | None, heading: str | None = None) -> Image.Image:
    """Draws the page.

    Args:
      headers: two lines of text per picture of an example, written above it.
      rows: one array [height, layout.example, 3] uint8 per example: its pictures, `layout.gap` pixels apart.
      captions: one list of (text, colour) per example, written side by side.
      heading: line of text at the top of the page.
    """
    line = layout.line
    top = layout.margin + (round(2.3 * line) if heading else 0)
    body = top + round(2.4 * line)
    step = layout.height + (round(2.6 * line) if captions else line)
    bottom = body + -(-len(rows) // layout.columns) * step - line
    page = Image.new('RGB', (layout.left(layout.columns) - layout.gutter + layout.margin, bottom + layout.margin), PAGE)
    draw = ImageDraw.Draw(page)
    if heading:
        write(page, layout.margin, layout.margin, heading, DARK, 1.5 * layout.text, page.width - 2 * layout.margin)
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


def _draw_headers(page: Image.Image, layout: Layout, x: int, y: int, headers: Sequence[tuple[str, str]]) -> None:
    for picture, (title, count) in enumerate(headers):
        left = x + picture * (layout.width + layout.gap)
        write(page, left, y, title, DARK, layout.text, layout.width)
        write(page, left, y + layout.line, count, GREY, layout.text, layout.width)


def _draw_caption(page: Image.Image, layout: Layout, x: int, y: int, parts: Sequence[tuple[str, tuple]]) -> None:
    """Writes the parts in one line. Each has an equal share of the example's width; the last one may be longer."""
    width = (layout.example - (len(parts) - 1) * layout.text) // len(parts)
    end = x + layout.example
    for number, (text, colour) in enumerate(parts, 1):
        limit = width if number < len(parts) else end - x
        x += write(page, x, y, text, colour, 1.1 * layout.text, limit) + layout.text


def write(page: Image.Image, x: int, y: int, text: str, colour: tuple, size: float, width: int) -> int:
    """Writes one line, cut at `width` pixels, and returns its width. Unprintable characters become '?'.

    Letters are drawn at four times their size and scaled down. Pillow places letters on whole pixels, so small text
    would be spaced unevenly.
    """
    text, font = ''.join(letter if letter.isprintable() else '?' for letter in text), _font(round(4 * size))
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
