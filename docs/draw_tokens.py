r"""Draws the pictures of the documentation with a pretrained model.

    python -m docs.draw_tokens hero weights/dinov2_s astronaut.png chelsea.png coffee.png --plan fast.json \
        --out docs/hero
    python -m docs.draw_tokens methods weights/dinov2_s chelsea.png --out docs/methods

hero draws the tokens that remain after some blocks under a plan, and the times and errors that the plan file records
(python -m evit_jax.plan --data). It writes OUT_light.webp and OUT_dark.webp. methods draws the same for each method at
--macs of the dense model's multiply-accumulates, one file in OUT for each.

The photographs in this folder are sample images of scikit-image: astronaut (NASA, public domain), chelsea (S. van der
Walt, CC0), coffee (R. Michetti, CC0).
"""

import argparse
import json
import pathlib
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
LABELS = {'dense': 'all tokens', 'searched': 'searched plan'}  # other figures of a plan file keep their names
METHODS = 'evit', 'tome', 'prune_merge', 'pitome', 'tofu', 'dpcknn', 'ats', 'heuristic'


class Theme(NamedTuple):
    """Colours of a picture, which is transparent."""

    ink: tuple[int, int, int]
    soft: tuple[int, int, int]
    bar: tuple[int, int, int]
    accent: tuple[int, int, int]


LIGHT = Theme((31, 35, 41), (102, 112, 128), (207, 217, 232), (37, 99, 184))
DARK = Theme((232, 235, 240), (152, 162, 177), (58, 70, 87), (106, 165, 245))
BOTH = Theme((124, 131, 141), (124, 131, 141), (0, 0, 0), (0, 0, 0))  # readable on light and dark pages


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


def draw_bars(page: Image.Image, y: int, figures: dict[str, dict], theme: Theme) -> None:
    """Draws the time of an image under each plan as a bar, with speed and error. The searched plan has the accent."""
    draw, left, width = ImageDraw.Draw(page), 330, page.width - 330 - 560
    order = sorted(figures.items(), key=lambda item: (item[0] != 'dense', -item[1]['error']))
    milliseconds = 1000 / figures['dense']['measured_images_per_second']
    for number, (name, plan) in enumerate(order):
        chosen, top, speed_up = name == 'searched', y + 58 * number, plan['measured_speed_up']
        colour = theme.ink if chosen else theme.soft
        write(page, 0, top + 2, LABELS.get(name, name), colour, 30, left - 20)
        end = left + round(width / speed_up)
        draw.rounded_rectangle((left, top, end, top + 42), 10, fill=theme.accent if chosen else theme.bar)
        text = f'{milliseconds / speed_up:.0f} ms'
        text += '' if name == 'dense' else f', {speed_up:.1f}x as fast, error {plan["error"]:.3g}'
        write(page, end + 18, top + 2, text, colour, 30, page.width - end - 18)


def save(page: Image.Image, path: str | pathlib.Path, quality: int) -> None:
    """Saves a page at half of its size. Colours of transparent pixels stay those of the text, for its edges."""
    page.resize((page.width // 2, page.height // 2), Image.Resampling.LANCZOS).save(path, quality=quality, method=6)


def hero(args: argparse.Namespace) -> None:
    """Writes the picture of the front page, in light and dark."""
    fast = evit_jax.load(args.model).with_image_size(SIDE).with_plan(plan=args.plan)
    figures = json.loads(pathlib.Path(args.plan).read_text())['figures']
    rows, captions = zip(*(stages_of(fast, path, 4) for path in args.images), strict=True)
    width, height = len(captions[0]) * (TILE + GAP) - GAP, 52 + len(rows) * (TILE + GAP) + 16 + 58 * len(figures)
    for name, theme in (('light', LIGHT), ('dark', DARK)):
        page = Image.new('RGBA', (width, height))
        end = draw_rows(page, rows, captions[0], theme)
        draw_bars(page, end + 16, figures, theme)
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
