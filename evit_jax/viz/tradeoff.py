"""Plots accuracy against MACs and against images per second, in front of other results for comparison."""

import itertools
import os
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, escape, style_panel

_COLOURS = BLUE, ORANGE, GREEN, PURPLE, RED
_FAINT = '#b4bbc6'
_MARKERS = 'o', 's', '^'    # markers of the published series
_PANEL, _HEIGHT = 5.6, 4.6  # inches
_LOG_RANGE = 8              # an axis is logarithmic if its largest value exceeds this multiple of the smallest


class Result(NamedTuple):
    """Accuracy, MACs and speed of one model under one plan; None marks unknown values."""

    series: str            # name of the series; a line joins its results
    label: str             # label of the point, for example the keep rate
    top1: float | None     # fraction of 1
    macs: int | None       # MACs of an image
    speed: float | None    # images per second
    measured: bool = False  # True if the speed comes from a benchmark, not from an evaluation


class _Cost(NamedTuple):
    """One axis of cost."""

    field: str  # field of Result
    title: str
    unit: str


_COSTS = (_Cost('macs', 'Top-1 against MACs', 'multiply-accumulates of an image'),
          _Cost('speed', 'Top-1 against throughput', 'images per second'))


def tradeoff_plot(results: Sequence[Result], path: str | os.PathLike | BinaryIO, *,
                  published: Sequence[Result] = ()) -> None:
    """Draws a PNG with a panel for MACs and a panel for speed. A panel is left out if no result has a value for it.

    Args:
      results: results to draw; those without an accuracy are skipped.
      path: path of the PNG, or an open file.
      published: published results, drawn faintly in the background.

    Raises:
      ValueError: no result has both an accuracy and a cost.
    """
    known = [cost for cost in _COSTS if any(_has(result, cost) for result in results)]
    if not known:
        raise ValueError('nothing to draw: no result has an accuracy and MACs or images per second')
    width = _PANEL * len(known)
    figure = Figure((width, _HEIGHT), dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    for number, cost in enumerate(known):
        left = number / len(known)
        ax = figure.add_axes((left + 0.62 / width, 0.125, (_PANEL - 1.0) / width, 0.765))
        _draw(ax, cost, [result for result in results if _has(result, cost)],
              [result for result in published if _has(result, cost)])
    figure.savefig(path, format='png')


def _has(result: Result, cost: _Cost) -> bool:
    return result.top1 is not None and bool(getattr(result, cost.field))


def _draw(ax: Axes, cost: _Cost, results: Sequence[Result], published: Sequence[Result]) -> None:
    style_panel(ax, cost.title)
    costs = [getattr(result, cost.field) for result in (*results, *published)]
    if max(costs) > _LOG_RANGE * min(costs):
        ax.set_xscale('log')
    for marker, points in zip(itertools.cycle(_MARKERS), _by_series(published, cost)):
        _line(ax, points, cost, _FAINT, marker=marker, markersize=4, linewidth=1.1)
        _label(ax, [result for result in points if not result.label.startswith('0.')], cost, _FAINT)
    series = _by_series(results, cost)
    for colour, points in zip(itertools.cycle(_COLOURS), series):
        _line(ax, points, cost, colour, marker='o', markersize=6, linewidth=2)
        _label(ax, points, cost, colour)
    ax.margins(0.09, 0.12)
    ax.set_xlabel(cost.unit, color=GREY, fontsize=9)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _amount(value)))
    if ax.get_xscale() == 'log':
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    legend = ax.legend(loc='best', frameon=False, fontsize=8.5, labelcolor='linecolor', handlelength=1.6,
                       alignment='left')
    if published:
        legend.set_title('grey: as published, ImageNet', {'size': 8.5})
        legend.get_title().set_color(GREY)


def _line(ax, points, cost, colour, **style):
    ax.plot([getattr(result, cost.field) for result in points], [100 * result.top1 for result in points], color=colour,
            label=escape(points[0].series), clip_on=False, **style)


def _label(ax, points, cost, colour):
    halo = [withStroke(linewidth=2.5, foreground='white')]
    for result in points:
        ax.annotate(escape(result.label), (getattr(result, cost.field), 100 * result.top1), (0, 7), color=colour,
                    textcoords='offset points', fontsize=8.5, ha='center', path_effects=halo)


def _by_series(results: Sequence[Result], cost: _Cost) -> list[list[Result]]:
    """Returns the results of each series, sorted by cost."""
    names = dict.fromkeys(result.series for result in results)
    return [sorted((result for result in results if result.series == name),
                   key=lambda result: getattr(result, cost.field)) for name in names]


def _amount(value: float) -> str:
    """Formats a number as 950, 18 M or 4.6 G."""
    for unit, power in (('G', 1e9), ('M', 1e6)):
        if value >= power:
            return f'{value / power:g} {unit}'
    return f'{value:,g}'
