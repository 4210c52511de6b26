"""Creates the HTML page of the analysis of a comparison: tables, matrices of pairs, and heat maps.

The page is one self-contained file without scripts.
"""

import html
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evit_jax.viz.patches import HEAT_COLOURS
from evit_jax.viz.templates import fill_page, jpeg_url

_JPEG_QUALITY, _SIDE = 92, 140  # width of a heat map in pixels


class AnalysisPart(NamedTuple):
    """The part of the page that shows one setting."""

    title: str
    figures: Mapping[str, Mapping[str, float]]              # label -> figure -> value
    correlations: Mapping[str, tuple[float, int]]           # figure -> correlation with top-1, number of cells
    matrices: Mapping[str, Mapping[tuple[str, str], float]]  # title -> pair of labels -> value in [0, 1]
    depths: Mapping[str, np.ndarray]                        # label -> [rows, columns] mean removal depth
    depth: int                                              # number of blocks of the model


def analysis_page(parts: Sequence[AnalysisPart], names: Mapping[str, str]) -> str:
    """Returns the page as HTML.

    Args:
      names: figure -> description; their order is that of the columns.
    """
    notes = ''.join(f'<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>' for name, text in names.items())
    return fill_page('analysis_page', 'Analysis of a comparison of token reducers', {
        'figures': notes, 'settings': ''.join(_section(part, tuple(names)) for part in parts)})


def _section(part, names):
    figures = table(['', 'top1', *names], [
        [label, *(f'{values[name]:.3f}' if name in values else '–' for name in ('top1', *names))]
        for label, values in part.figures.items()] + [
        ['correlation with top1', '', *(f'{part.correlations[name][0]:+.2f} (n = {part.correlations[name][1]})'
                                        if name in part.correlations else '–' for name in names)]])
    matrices = ''.join(f'<h3>{html.escape(title)}</h3><div class="wide">{_matrix(pairs)}</div>'
                       for title, pairs in part.matrices.items() if pairs)
    maps = ''.join(_heat_map(label, depths, part.depth) for label, depths in part.depths.items())
    heading = '<h3>Mean number of blocks that see a patch</h3>' if maps else ''
    return (f'<section><h2>{html.escape(part.title)}</h2><div class="wide">{figures}</div>{matrices}{heading}'
            f'<div class="maps">{maps}</div></section>')


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table."""
    def row(tag, cells):
        return f'<tr>{"".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)}</tr>'

    return f'<table>{row("th", head)}{"".join(row("td", cells) for cells in rows)}</table>'


def _matrix(pairs):
    """Returns a table of the values of all pairs. The colour of a cell grows with its value."""
    labels = list(dict.fromkeys(label for pair in pairs for label in pair))
    rows = []
    for label in labels:
        values = [1.0 if other == label else pairs.get((label, other), pairs.get((other, label))) for other in labels]
        rows.append(f'<tr><td>{html.escape(label)}</td>' + ''.join(
            '<td>–</td>' if value is None else
            f'<td style="background:color-mix(in srgb, var(--blue) {55 * value:.0f}%, transparent)">{value:.2f}</td>'
            for value in values) + '</tr>')
    head = ''.join(f'<th>{html.escape(label)}</th>' for label in ['', *labels])
    return f'<table class="matrix"><tr>{head}</tr>{"".join(rows)}</table>'


def _heat_map(label, depths, depth):
    colours = HEAT_COLOURS[np.rint(depths / depth * (len(HEAT_COLOURS) - 1)).astype(int)]
    scale = max(1, _SIDE // depths.shape[1])
    text = f'{label}: {depths.min():.1f} to {depths.max():.1f} of {depth}'
    return (f'<figure><img alt="{html.escape(text)}" src="'
            f'{jpeg_url(colours.repeat(scale, 0).repeat(scale, 1), _JPEG_QUALITY)}">'
            f'<figcaption>{html.escape(text)}</figcaption></figure>')
