"""Draws one image under one setting, with rows for kept tokens, class attention and fused token."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from evit_jax.viz.example import Example, Setting
from evit_jax.viz.kept import MIN_HEIGHT, RIGHT, WRONG, kept_row, side_by_side
from evit_jax.viz.page import DARK, GREY, Layout, draw_page
from evit_jax.viz.patches import enlarge, heat_map


def example_sheet(example: Example, number: int, setting: Setting, *, patch_size: int,
                  stages: Sequence[str]) -> Image.Image:
    """Draws the page of one view.

    Args:
      number: index of the view.
      setting: the setting of the view.
      patch_size: side of a patch in pixels.
      stages: a name for each stage, for example 'block 3'.
    """
    view, image = example.views[number], example.image
    scale = max(1, round(MIN_HEIGHT / len(image)))
    layout = Layout.of_pictures(len(image) * scale, len(image) * scale, len(stages) + 1)
    rows = [kept_row(image, [np.array(stage.kept) for stage in view.stages], patch_size, scale=scale, gap=layout.gap,
                     token_of_patch=[stage.token_of_patch for stage in view.stages])]
    captions = [_prediction(example, number)]
    for title, maps in (('class attention', [stage.attention for stage in view.stages]),
                        ('weights of the fused token', [stage.fused_weights for stage in view.stages])):
        if any(values is not None for values in maps):
            pictures = [image, *(_map(image, values, patch_size) for values in maps)]
            rows.append(side_by_side([enlarge(picture, scale) for picture in pictures], layout.gap))
            captions.append([(f'{title}, up to {_peaks(maps)}', GREY)])
    headers = [('image', f'{setting.counts[0]} patches')]
    headers += [(f'stage {stage}, {name}', f'{count} tokens')
                for stage, (name, count) in enumerate(zip(stages, setting.counts[1:], strict=True), 1)]
    return draw_page(layout, headers, rows, captions, f'keep rate {setting.rate}')


def _prediction(example: Example, number: int) -> list[tuple[str, tuple]]:
    view = example.views[number]
    name, share = view.guesses[0]
    colour = {None: DARK, True: RIGHT, False: WRONG}[view.right]
    parts = [(f'predicted {name} ({100 * share:.0f} %)', colour)]
    return parts if example.truth is None else [*parts, (f'truth {example.truth}', GREY if view.right else DARK)]


def _map(image, values, patch_size):
    """Returns a heat map. Patches without a positive value fade; if `values` is None, all patches fade."""
    patches = image.shape[0] // patch_size * (image.shape[1] // patch_size)
    values = np.full(patches, np.nan) if values is None else np.where(values > 0, values, np.nan)
    return heat_map(image, values, patch_size)


def _peaks(maps):
    """Formats the largest value of each map, as in '4.1, 3.5 and 8.2 %'."""
    peaks = [f'{100 * np.nanmax(values):.2g}' for values in maps if values is not None]
    return ' and '.join(filter(None, [', '.join(peaks[:-1]), peaks[-1]])) + ' %'
