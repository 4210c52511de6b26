"""Creates the HTML page of a plan search: figures, curves, and images with dropped and merged patches.

The page is one self-contained file without scripts.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evit_jax.viz.example import ReductionView
from evit_jax.viz.patches import draw_tokens, grid, num_tokens, patch_groups
from evit_jax.viz.search_plots import Point, error_plot, removed_plot, tokens_plot
from evit_jax.viz.templates import fill_page, jpeg_url

_JPEG_QUALITY = 88
_SCALE_TO = 224     # images with fewer pixels in height are enlarged to about this height
_DARK = (16, 18, 22)  # colour that dropped patches fade towards
_DIM = 0.12           # contrast of a dropped patch
_COLUMNS = {  # figure -> title and format
    'error': ('error', '{:.3g}'), 'error_90': ('90 % quantile', '{:.3g}'), 'agreement': ('same class', '{:.1%}'),
    'top1': ('top-1', '{:.1%}'), 'macs': ('GMACs', '{:.3g}'), 'macs_fraction': ('of dense', '{:.1%}'),
    'tokens': ('tokens', '{:.1%}'), 'predicted_speed_up': ('predicted speed', '{:.2f}x'),
    'estimated_speed_up': ('estimated speed', '{:.2f}x'), 'measured_speed_up': ('measured speed', '{:.2f}x'),
    'measured_images_per_second': ('images/s', '{:,.1f}')}


class PlanFigures(NamedTuple):
    """A plan of the table and of the curves."""

    figures: Mapping[str, float]  # keys of `_COLUMNS` -> values; unknown ones are absent
    tokens: tuple[int, ...]       # number of patch tokens before the first block, then after each block


class CheckedImage(NamedTuple):
    """An image with its tokens after some blocks under the searched plan."""

    name: str
    rank: str          # position among the errors, such as 'median'
    error: float
    image: np.ndarray  # [H, W, 3] uint8
    stages: tuple[ReductionView, ...]


class TargetPart(NamedTuple):
    """The part of the page that shows one target."""

    target: str
    sentence: str
    note: str                        # description of the searched plan
    plans: Mapping[str, PlanFigures]  # the searched plan first, then the baselines
    merged: tuple[int, ...]          # number of tokens that each block merges into others
    dropped: tuple[int, ...]         # number of tokens that each block drops
    methods: Mapping[str, float]     # reducer -> error in the first stage of the search
    images: tuple[CheckedImage, ...]


class SearchPage(NamedTuple):
    """The content of the page."""

    title: str
    error_name: str
    dense: PlanFigures
    targets: tuple[TargetPart, ...]
    stages: tuple[str, ...]          # name of each stage of the images, such as 'after block 6 of 12'
    patch_size: int                  # side of a patch in pixels
    facts: Mapping[str, str]         # how the search ran
    limits: tuple[str, ...]          # sentences: restrictions of the figures


def search_page(page: SearchPage) -> str:
    """Returns the page as HTML."""
    parts = {
        'sentences': ''.join(f'<p>{html.escape(part.sentence)}</p>' for part in page.targets),
        'table': _figures_table(page),
        'table_note': html.escape(f'Error: {page.error_name} between the outputs of a plan and those of the dense '
                                  'model. Lower is better.'),
        'plots': _error_plots(page),
        'targets': '\n'.join(_target(page, number) for number in range(len(page.targets))),
        'methods': _methods_table(page),
        'facts': ''.join(f'<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>'
                         for name, value in page.facts.items()),
        'limits': ''.join(f'<li>{html.escape(sentence)}</li>' for sentence in page.limits)}
    return fill_page('search_page', page.title, parts)


def _figures_table(page: SearchPage) -> str:
    known = page.dense.figures.keys() | {key for part in page.targets for plan in part.plans.values()
                                         for key in plan.figures}
    columns = [key for key in _COLUMNS if key in known]
    rows = [_row('th', ['', *(_COLUMNS[key][0] for key in columns)]),
            _row('td', ['dense', *_cells(page.dense.figures, columns)])]
    for part in page.targets:
        rows.append(f'<tr class="target"><th colspan="{len(columns) + 1}">{html.escape(part.target)}</th></tr>')
        rows += [_row('td', [name, *_cells(plan.figures, columns)], 'first' if number == 0 else '')
                 for number, (name, plan) in enumerate(part.plans.items())]
    return f'<table>{"".join(rows)}</table>'


def _cells(figures: Mapping[str, float], columns: Sequence[str]) -> list[str]:
    # Rounding hides the rounding errors of the dense model, whose error is 0.
    return [_COLUMNS[key][1].format(round(figures[key] / (1e9 if key == 'macs' else 1), 9) + 0.0) if key in figures
            else '–' for key in columns]


def _row(tag: str, cells: Sequence[str], kind: str = '') -> str:
    return f'<tr{kind and f" class={kind}"}>{"".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)}</tr>'


def _methods_table(page: SearchPage) -> str:
    names = dict.fromkeys(name for part in page.targets for name in part.methods)
    rows = [_row('th', ['error of each method in the first stage', *(part.target for part in page.targets)])]
    rows += [_row('td', [name, *(f'{part.methods[name]:.3g}' if name in part.methods else '–'
                                 for part in page.targets)]) for name in names]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _error_plots(page: SearchPage) -> str:
    plots = []
    for key, cost_name, cost_format in (('macs_fraction', 'MACs relative to dense', '{:.0%}'),
                                        ('measured_speed_up', 'measured speed relative to dense', '{:.3g}x')):
        series = {name: [Point(part.plans[name].figures[key], part.plans[name].figures['error'])
                         for part in page.targets if key in part.plans[name].figures]
                  for name in page.targets[0].plans}
        if any(series.values()):
            plots.append(error_plot(series, error_name=page.error_name, cost_name=cost_name, cost_format=cost_format,
                                    name=key))
    return ''.join(f'<div>{plot}</div>' for plot in plots)


def _target(page: SearchPage, number: int) -> str:
    part = page.targets[number]
    plots = (tokens_plot({name: plan.tokens for name, plan in part.plans.items()}, name=f'tokens{number}'),
             removed_plot(part.merged, part.dropped, name=f'removed{number}'))
    images = ''.join(_image(page, image) for image in part.images)
    return (f'<section><h2>Target {html.escape(part.target)}</h2><p class="note">{html.escape(part.note)}</p>'
            f'<div class="plots">{"".join(f"<div>{plot}</div>" for plot in plots)}</div>'
            '<h3>Dropped and merged patches on images of the check</h3><p class="note">A merged token has the mean '
            'colour of its patches and a thin line around them. Dropped patches are dark. Patches that are alone in '
            f'their token are unchanged.</p><div class="images">{images}</div></section>')


def _image(page: SearchPage, image: CheckedImage) -> str:
    rows, columns = grid(image.image, page.patch_size)
    scale = max(1, round(_SCALE_TO / len(image.image)))
    original = image.image.repeat(scale, 0).repeat(scale, 1)
    figures = [_figure(original, f'{rows * columns} patches')]
    for name, stage in zip(page.stages, image.stages, strict=True):
        kept = np.array(stage.kept)
        groups = patch_groups(kept, stage.token_of_patch, rows * columns)
        dropped = int((groups < 0).sum())
        picture = draw_tokens(image.image, kept, page.patch_size, token_of_patch=stage.token_of_patch, dim=_DIM,
                              faded=_DARK, scale=scale)
        figures.append(_figure(picture, f'{name}: {num_tokens(groups)} tokens'
                                        + (f', {dropped} patches dropped' if dropped else '')))
    return (f'<div><h4>{html.escape(image.rank)}: error {image.error:.3g} <span>{html.escape(image.name)}</span></h4>'
            f'<div class="row">{"".join(figures)}</div></div>')


def _figure(picture: np.ndarray, caption: str) -> str:
    return (f'<figure><img alt="{html.escape(caption)}" loading="lazy" src="{jpeg_url(picture, _JPEG_QUALITY)}">'
            f'<figcaption>{html.escape(caption)}</figcaption></figure>')
