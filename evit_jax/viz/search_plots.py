"""Plots the result of a plan search, as SVG for a page: errors against costs, and the tokens of each block."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, INK, ORANGE, escape, style_panel, write_ends
from evit_jax.viz.templates import svg

_COLOURS = BLUE, ORANGE, GREEN  # distinct for colour-blind readers; markers and labels differ too
_MARKERS, _DASHES = 'os^', ('-', (0, (5, 2)), (0, (1.5, 1.5)))
_OFFSETS = (0, -15), (0, 8), (8, 1)  # from a point to its value; points
_MIN_RANGE = 0.2  # least range of the costs on both sides of their middle, relative to it
_SIZE = 5.0, 3.4  # inches


class Point(NamedTuple):
    """The error and the cost of one plan."""

    cost: float
    error: float


def error_plot(series: Mapping[str, Sequence[Point]], *, error_name: str, cost_name: str, cost_format: str,
               name: str) -> str:
    """Returns an SVG of errors on a logarithmic scale against costs. Errors of 0 are left out.

    Args:
      series: name -> points, at most three series; the first is emphasised.
      cost_format: format of the ticks of the costs, such as '{:.0%}'.
      name: see `templates.svg`.
    """
    ax = _axes(f'Error against {cost_name}', right=1.6)
    ends = []
    for (label, points), colour, marker, offset in zip(series.items(), _COLOURS, _MARKERS, _OFFSETS):
        points = sorted(point for point in points if point.error > 0)
        if not points:
            continue
        ax.plot(*zip(*points), color=colour, marker=marker, markersize=7, linewidth=2.4 if not ends else 1.6,
                clip_on=False, zorder=3 if not ends else 2)
        for point in points:
            ax.annotate(f'{point.error:.3g}', point, offset, textcoords='offset points', color=colour, fontsize=9,
                        ha='left' if offset[0] else 'center')
        ends.append((points[-1], label, colour))
    ax.margins(0.22, 0.14)
    ax.set_yscale('log')
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    low, high = ax.get_xlim()
    middle, reach = (low + high) / 2, _MIN_RANGE * (low + high) / 2
    ax.set_xlim(min(low, middle - reach), max(high, middle + reach))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost_format.format(value)))
    _write_labels(ax, ends)
    ax.set_xlabel(cost_name, color=GREY, fontsize=9.5)
    texts = (f'{label}: ' + ', '.join(f'{point.error:.3g} at {cost_format.format(point.cost)}' for point in points)
             for label, points in series.items())
    return svg(ax.figure, name, f'{error_name} against {cost_name}. {"; ".join(texts)}')


def tokens_plot(series: Mapping[str, Sequence[int]], *, name: str) -> str:
    """Returns an SVG of step lines: the number of patch tokens before the first block, then after each block.

    Args:
      series: name -> counts, at most three series of equal length; the first is emphasised.
      name: see `templates.svg`.
    """
    ax = _axes('Patch tokens after each block', right=1.6)
    ends = []
    for (label, counts), colour, dash in zip(series.items(), _COLOURS, _DASHES):
        ax.step(range(len(counts)), counts, where='post', color=colour, linestyle=dash,
                linewidth=2.6 if not ends else 1.8, zorder=3 if not ends else 2)
        ends.append((counts[-1], f'{counts[-1]} {escape(label)}', colour))
    ax.set_xlim(0, len(next(iter(series.values()))) - 1)
    ax.set_ylim(0)
    _number_blocks(ax)
    write_ends(ax, ends)
    return svg(ax.figure, name, 'Patch tokens after each block. ' + '; '.join(
        f'{label}: {", ".join(map(str, counts))}' for label, counts in series.items()))


def removed_plot(merged: Sequence[int], dropped: Sequence[int], *, name: str) -> str:
    """Returns an SVG of bars: the number of tokens that each block merges into others, and that it drops.

    Args:
      merged, dropped: one number for each block.
      name: see `templates.svg`.
    """
    ax = _axes('Tokens that leave in each block', right=0.2)
    blocks = range(1, len(merged) + 1)
    ax.bar(blocks, merged, color=BLUE, width=0.72)
    ax.bar(blocks, dropped, bottom=merged, color=ORANGE, width=0.72, hatch='////', edgecolor=INK, linewidth=0)
    for block, count in zip(blocks, map(sum, zip(merged, dropped))):
        if count:
            ax.annotate(str(count), (block, count), (0, 3), textcoords='offset points', color=GREY, fontsize=8.5,
                        ha='center')
    for row, (kind, counts, colour) in enumerate((('merged', merged, BLUE), ('dropped', dropped, ORANGE))):
        if not any(counts):
            continue
        ax.annotate(f'{kind} {sum(counts)}', (1, 1), (0, -14 * row), xycoords='axes fraction',
                    textcoords='offset points', color=colour, fontsize=10, ha='right', va='top')
    ax.margins(x=0.02)
    ax.set_ylim(0, 1.15 * max(map(sum, zip(merged, dropped))) or 1)
    _number_blocks(ax)
    return svg(ax.figure, name, f'Merged in each block: {", ".join(map(str, merged))}. '
                                f'Dropped in each block: {", ".join(map(str, dropped))}')


def _axes(title: str, *, right: float) -> Axes:
    width, height = _SIZE
    figure = Figure(_SIZE)
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.5 / width, 0.5 / height, (width - 0.55 - right) / width, (height - 0.95) / height))
    style_panel(ax, title)
    return ax


def _number_blocks(ax: Axes) -> None:
    ax.set_xlabel('block', color=GREY, fontsize=9.5)
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))


def _write_labels(ax, ends):
    """Writes the label of each series at the right of the panel, at the height of its last point."""
    if not ends:
        return
    ax.figure.canvas.draw()  # fixes the limits
    pixels = [(ax.transData.transform(point)[1], label, colour) for point, label, colour in ends]
    low, high = ax.bbox.y0, ax.bbox.y1
    heights = []
    for height, label, colour in sorted(pixels, reverse=True):
        height = min((height - low) / (high - low), *(other - 0.09 for other in heights), 1.0)
        heights.append(height)
        ax.annotate(escape(label), (1, height), (6, 0), xycoords='axes fraction', textcoords='offset points',
                    color=colour, fontsize=9.5, va='center', annotation_clip=False)
