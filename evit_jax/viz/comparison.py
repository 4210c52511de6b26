"""Plots the accuracy of several methods against their cost, with one panel per training setting."""

import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, style_panel

_COLOURS = BLUE, ORANGE, GREEN, PURPLE, RED, '#22b8cf', '#8a5a00', '#f783ac', '#343a40'
_MARKERS = 'o', 's'  # the second marker is for series with a repeated colour
_PANEL, _HEIGHT = 4.6, 4.4  # inches
_LEGEND, _LETTER = 0.7, 0.068  # width of the legend: inches without names, and inches per letter of the longest name


class Point(NamedTuple):
    """The accuracy of one method at one cost."""

    series: str
    cost: float    # MACs relative to the dense model
    top1: float    # fraction of 1
    spread: float  # half the length of the error bar, fraction of 1


def comparison_plot(panels: Mapping[str, Sequence[Point]], dense: Mapping[str, float],
                    path: str | os.PathLike | BinaryIO) -> None:
    """Draws a PNG. If a panel has only one cost, its methods are placed side by side.

    Args:
      panels: title -> points.
      dense: title -> top-1 of the dense model.
      path: path of the PNG, or an open file.
    """
    names = list(dict.fromkeys(point.series for points in panels.values() for point in points))
    width = _PANEL * len(panels) + _LEGEND + _LETTER * max(map(len, names))
    figure = Figure((width, _HEIGHT), dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    looks = {name: {'color': _COLOURS[number % len(_COLOURS)],
                    'marker': _MARKERS[number // len(_COLOURS) % len(_MARKERS)]} for number, name in enumerate(names)}
    lines = {}
    for number, (title, points) in enumerate(panels.items()):
        ax = figure.add_axes(((number * _PANEL + 0.62) / width, 0.135, (_PANEL - 0.9) / width, 0.745))
        style_panel(ax, f'Top-1, {title}')
        if title in dense:
            ax.axhline(100 * dense[title], color=GREY, linewidth=1, linestyle=(0, (4, 3)))
            ax.annotate('dense', (0.01, 100 * dense[title]), (0, 3), xycoords=('axes fraction', 'data'),
                        textcoords='offset points', color=GREY, fontsize=8.5)
        present = [name for name in names if any(point.series == name for point in points)]
        single_cost = len(points) == len(present)
        for index, name in enumerate(present):
            own = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
            lines[name] = ax.errorbar([index if single_cost else 100 * point.cost for point in own],
                                      [100 * point.top1 for point in own], [100 * point.spread for point in own],
                                      **looks[name], markersize=5, linewidth=1.8, elinewidth=1.2, capsize=2.5)
        ax.margins(0.1, 0.1)
        label = 'multiply-accumulates, % of dense'
        if single_cost:
            ax.set_xticks([])
            costs = sorted(round(100 * point.cost) for point in points)
            label = f'{" to ".join(map(str, sorted({costs[0], costs[-1]})))} % of the multiply-accumulates of dense'
        ax.set_xlabel(label, color=GREY, fontsize=9)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    figure.legend(lines.values(), lines.keys(), loc='center right', frameon=False, fontsize=9)
    figure.savefig(path, format='png')
