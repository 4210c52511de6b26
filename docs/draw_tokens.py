r"""Draws the pictures of the documentation with a pretrained model.

    python docs/draw_tokens.py hero weights/dinov2_s astronaut.png chelsea.png coffee.png --plan fast.json \
        --out docs/hero
    python docs/draw_tokens.py methods weights/dinov2_s chelsea.png --out docs/methods

hero draws the tokens that remain after some blocks under a plan, and measures the time of an image. It writes
OUT_light.webp and OUT_dark.webp. methods draws the same for each method at --macs of the dense model's
multiply-accumulates, one file in OUT for each.

The photographs in this folder are sample images of scikit-image: astronaut (NASA, public domain), chelsea (S. van der
Walt, CC0), coffee (R. Michetti, CC0).
"""

import argparse
import pathlib
import time
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

import evit_jax
from evit_jax.inference.model import VisionModel
from evit_jax.viz.page import write
from evit_jax.viz.patches import draw_tokens, num_tokens, patch_groups

SIDE = 224           # pixels of a model input
SCALE = 2            # pictures have twice the pixels of the model input, before they are shrunk to TILE
TILE, GAP = 400, 14  # pixels
METHODS = 'evit', 'tome', 'prune_merge', 'pitome', 'tofu', 'dpcknn', 'heuristic'


class Theme(NamedTuple):
    """Colours of a picture, which is transparent."""

    ink: tuple[int, int, int]
    soft: tuple[int, int, int]
    bar: tuple[int, int, int]
    accent: tuple[int, int, int]


LIGHT = Theme((31, 35, 41), (102, 112, 128), (207, 217, 232), (37, 99, 184))
DARK = Theme((232, 235, 240), (152, 162, 177), (58, 70, 87), (106, 165, 245))
BOTH = Theme((124, 131, 141), (124, 131, 141), (0, 0, 0), (0, 0, 0))  # for pages in light and dark


def square(path: str, side: int) -> np.ndarray:
    """Returns the central square of an image file, uint8 [side, side, 3]."""
    return np.asarray(ImageOps.fit(Image.open(path).convert('RGB'), (side, side), Image.Resampling.LANCZOS))


def stages_of(model: VisionModel, path: str, count: int) -> tuple[list[Image.Image], list[str]]:
    """Draws an image and its tokens after `count` reductions, evenly spaced. Returns pictures and captions."""
    output, blocks = model.forward(square(path, SIDE)[None]), model.plan.reductions
    picture, patch = square(path, SIDE * SCALE), model.config.patch_size * SCALE
    shown = sorted({round(index) for index in np.linspace(0, len(blocks) - 1, count + 1)[1:]}
                   if len(blocks) > count else range(len(blocks)))
    pictures, captions = [picture], [f'{model.plan.patches} patches']
    for index in shown:
        kept, groups = np.asarray(output.kept[index][0]), np.asarray(output.token_of_patch[index][0])
        pictures.append(draw_tokens(picture, kept, patch, token_of_patch=groups, dim=0.18, faded=(150, 156, 166)))
        number = num_tokens(patch_groups(kept, groups, model.plan.patches))
        captions.append(f'after block {blocks[index] + 1}: {number} tokens')
    return [Image.fromarray(each).resize((TILE, TILE), Image.Resampling.LANCZOS) for each in pictures], captions


def milliseconds(models: list[VisionModel], batch: int = 16, rounds: int = 7) -> list[float]:
    """Returns the least time of an image for each model. The models are timed in turns."""
    images = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), np.uint8)
    times = np.zeros((rounds, len(models)))
    for model in models:
        model(images).block_until_ready()
    for row in times:
        for index, model in enumerate(models):
            start = time.perf_counter()
            model(images).block_until_ready()
            row[index] = time.perf_counter() - start
    return (1000 * times.min(axis=0) / batch).tolist()


def paste_rounded(page: Image.Image, picture: Image.Image, x: int, y: int) -> None:
    """Pastes a picture with rounded corners."""
    mask = Image.new('L', (4 * TILE, 4 * TILE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * TILE - 1, 4 * TILE - 1), 64, fill=255)
    page.paste(picture, (x, y), mask.resize(picture.size, Image.Resampling.LANCZOS))


def draw_rows(page: Image.Image, rows: list[list[Image.Image]], captions: list[str], theme: Theme) -> int:
    """Draws a caption above each column, and the rows below. Returns the y coordinate of the end."""
    for column, caption in enumerate(captions):
        write(page, column * (TILE + GAP), 0, caption, theme.ink if column else theme.soft, 30, TILE)
    for number, row in enumerate(rows):
        for column, picture in enumerate(row):
            paste_rounded(page, picture, column * (TILE + GAP), 52 + number * (TILE + GAP))
    return 52 + len(rows) * (TILE + GAP)


def draw_bars(page: Image.Image, y: int, labels: list[str], values: list[float], theme: Theme) -> None:
    """Draws a horizontal bar for each value, in milliseconds. The last one has the accent colour."""
    draw, left, width = ImageDraw.Draw(page), 330, page.width - 330 - 360
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        last, top = number == len(values) - 1, y + 62 * number
        write(page, 0, top + 4, label, theme.ink if last else theme.soft, 30, left - 20)
        end = left + round(width * value / max(values))
        draw.rounded_rectangle((left, top, end, top + 44), 10, fill=theme.accent if last else theme.bar)
        text = f'{value:.0f} ms an image' + (f', {values[0] / value:.1f}x' if last else '')
        write(page, end + 18, top + 4, text, theme.ink if last else theme.soft, 30, page.width - end - 18)


def save(page: Image.Image, path: str | pathlib.Path, quality: int) -> None:
    """Saves a page at half of its size. Colours of transparent pixels stay those of the text, for its edges."""
    page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).save(path, quality=quality, method=6)


def hero(args: argparse.Namespace) -> None:
    """Writes the picture of the front page, in light and dark."""
    dense = evit_jax.load(args.model).with_image_size(SIDE).with_plan(keep_rate=1.0)
    fast = dense.with_plan(plan=args.plan)
    rows, captions = zip(*(stages_of(fast, path, 4) for path in args.images), strict=True)
    times = milliseconds([dense, fast])
    print(f'{fast.plan}: {times} ms an image')
    width, height = len(captions[0]) * (TILE + GAP) - GAP, 52 + len(rows) * (TILE + GAP) + 140
    for name, theme in (('light', LIGHT), ('dark', DARK)):
        page = Image.new('RGBA', (width, height))
        end = draw_rows(page, rows, captions[0], theme)
        draw_bars(page, end + 16, ['all tokens', 'searched plan'], times, theme)
        save(page, f'{args.out}_{name}.webp', args.quality)


def methods(args: argparse.Namespace) -> None:
    """Writes a picture for each method."""
    model = evit_jax.load(args.model).with_image_size(SIDE)
    pathlib.Path(args.out).mkdir(parents=True, exist_ok=True)
    for name in args.names.split(','):
        row, captions = stages_of(model.with_reducer(name).with_plan(macs=args.macs), args.images[0], 3)
        page = Image.new('RGBA', (len(row) * (TILE + GAP) - GAP, TILE + 52))
        draw_rows(page, [row], captions, BOTH)
        save(page, pathlib.Path(args.out) / f'{name}.webp', args.quality)
        print(name, captions)


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line, by default that of the process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['hero', 'methods'])
    parser.add_argument('model', help='a run, a file or folder of weights, or hf-hub:ORG/NAME')
    parser.add_argument('images', nargs='+')
    parser.add_argument('--plan', help='hero: plan file')
    parser.add_argument('--out', required=True, help='hero: start of the file names; methods: folder')
    parser.add_argument('--macs', type=float, default=0.5)
    parser.add_argument('--names', default=','.join(METHODS), help='methods, with commas between')
    parser.add_argument('--quality', type=int, default=80, help='of the WebP files')
    return parser.parse_args(words)


if __name__ == '__main__':
    args = parse_args()
    {'hero': hero, 'methods': methods}[args.what](args)
