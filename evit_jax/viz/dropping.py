"""Plots accuracy against the fraction of patches dropped before the first block, and formats it as CSV."""

import csv
import io
import itertools
import os
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, style_panel

_COLOURS = RED, GREEN, GREY, BLUE, ORANGE, PURPLE, INK
_SIZE = 8.4, 5.0  # inches
_LABEL_SPACING = 0.043  # minimum distance between labels, relative to the height of the panel


def dropping_plot(shares: Sequence[float], accuracy: Mapping[str, np.ndarray], path: str | os.PathLike | BinaryIO, *,
                  on_object: float, title: str) -> None:
    """Draws a PNG with a line for each order of dropping patches.

    Args:
      shares: ascending fractions of dropped patches.
      accuracy: name of the order -> accuracy at each fraction.
      on_object: fraction of the patches on the object; marked by a line.
      path: path of the PNG, or an open file.
    """
    figure = Figure(_SIZE, dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.075, 0.115, 0.69, 0.755))
    style_panel(ax, '')
    percent = 100 * np.asarray(shares)
    for (name, values), colour in zip(accuracy.items(), itertools.cycle(_COLOURS)):
        ax.plot(percent, 100 * np.asarray(values), color=colour, linewidth=1.8, marker='o', markersize=3.5,
                clip_on=False, label=name)
    ax.set_xlim(0, max(percent[-1], 1))
    ax.set_ylim(0, 100)
    ax.axvline(100 * on_object, color=GREY, linewidth=0.9, linestyle=(0, (3, 3)))
    ax.annotate('the object', (100 * on_object, 100), (0, 4), textcoords='offset points', color=GREY, fontsize=8.5,
                ha='center')
    ax.set_xlabel('patches dropped before the first block', color=GREY, fontsize=9)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    ax.xaxis.set_major_locator(MultipleLocator(10))
    _label(ax, percent, accuracy)
    figure.text(0.075, 0.955, title, color=INK, fontsize=12, va='center')
    figure.savefig(path, format='png')


def dropping_csv(shares: Sequence[float], accuracy: Mapping[str, np.ndarray]) -> str:
    """Returns CSV with a row for each fraction and a column for each order."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['dropped', *accuracy])
    for number, share in enumerate(shares):
        table.writerow([f'{share:.4f}', *(f'{values[number]:.4f}' for values in accuracy.values())])
    return text.getvalue()


def _label(ax, percent, accuracy):
    """Writes the name of each line at its right end. Names are placed from top to bottom and do not overlap."""
    lines = dict(zip(accuracy, (line for line in ax.get_lines() if line.get_label() in accuracy)))
    height = 2.0
    lowest = [index * _LABEL_SPACING for index in range(len(accuracy))]
    for name, least in zip(sorted(accuracy, key=lambda name: -accuracy[name][-1]), reversed(lowest)):
        height = max(min(accuracy[name][-1], height - _LABEL_SPACING), least)
        ax.annotate(name, (1, height), (10, 0), xycoords='axes fraction', textcoords='offset points',
                    color=lines[name].get_color(), fontsize=9.5, va='center', annotation_clip=False)
