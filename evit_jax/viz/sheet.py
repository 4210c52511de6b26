"""One image under one setting on a page: what each stage keeps, looks at and fuses, below each other."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.example import Example, Setting
from evit_jax.viz.heat import heat_map
from evit_jax.viz.kept import RIGHT, SIDE, WRONG, kept_row
from evit_jax.viz.page import DARK, GREY, PAGE, draw_page, enlarged, setup


def example_sheet(example: Example, number: int, setting: Setting, *, patch_size: int,
                  stages: Sequence[str]) -> Image.Image:
    """The page of one view.

    Args:
      number: of the view and its setting.
      patch_size: pixels a side.
      stages: what is said of each, as 'block 3'.
    """
    view, image = example.views[number], example.image
    scale = max(1, round(SIDE / len(image)))
    layout = setup(len(image) * scale, len(image) * scale, len(stages) + 1)
    token_of_patch = [stage.token_of_patch for stage in view.stages]
    rows = [kept_row(image, [np.array(stage.kept) for stage in view.stages], patch_size, scale=scale, gap=layout.gap,
                     token_of_patch=token_of_patch if any(of is not None for of in token_of_patch) else None)]
    captions = [_answer(example, number)]
    for said, maps in (('class attention', [stage.attention for stage in view.stages]),
                       ('what the fused token is made of', [stage.origin for stage in view.stages])):
        if any(values is not None for values in maps):
            pictures = [image, *(_map(image, values, patch_size) for values in maps)]
            rows.append(_beside([enlarged(picture, scale) for picture in pictures], layout.gap))
            captions.append([(f'{said}, up to {_peaks(maps)}', GREY)])
    headers = [('image', f'{setting.counts[0]} patches')]
    headers += [(f'stage {stage}, {said}', f'{count} tokens')
                for stage, (said, count) in enumerate(zip(stages, setting.counts[1:], strict=True), 1)]
    return draw_page(layout, headers, rows, captions, f'keep rate {setting.rate}')


def _answer(example: Example, number: int) -> list[tuple[str, tuple]]:
    view = example.views[number]
    name, share = view.guesses[0]
    colour = {None: DARK, True: RIGHT, False: WRONG}[view.right]
    said = [(f'predicted {name} ({100 * share:.0f} %)', colour)]
    return said if example.truth is None else [*said, (f'truth {example.truth}', GREY if view.right else DARK)]


def _map(image, values, patch_size):
    """A map; where there is none, and where an origin is 0, the patches fade."""
    patches = image.shape[0] // patch_size * (image.shape[1] // patch_size)
    values = np.full(patches, np.nan) if values is None else np.where(values > 0, values, np.nan)
    return heat_map(image, values, patch_size)


def _peaks(maps):
    """'4.1, 3.5 and 8.2 %'"""
    peaks = [f'{100 * np.nanmax(values):.2g}' for values in maps if values is not None]
    return ' and '.join(filter(None, [', '.join(peaks[:-1]), peaks[-1]])) + ' %'


def _beside(pictures, gap):
    space = np.full((len(pictures[0]), gap, 3), PAGE, np.uint8)
    return np.concatenate([part for picture in pictures for part in (space, picture)][1:], axis=1)
