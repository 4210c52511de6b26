"""Accuracy against the share of the patches that a model does not get to see, as a plot and as CSV."""

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

from evit_jax.viz.axes import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, bare

_COLOURS = RED, GREEN, GREY, BLUE, ORANGE, PURPLE, INK
_SIZE = 8.4, 5.0  # inches
_LINE = 0.043     # of the panel's height, between two labels


def dropping_plot(shares: Sequence[float], accuracy: Mapping[str, np.ndarray], path: str | os.PathLike | BinaryIO, *,
                  on_object: float, title: str) -> None:
    """Draws a PNG with a line for each order in which patches were dropped.

    Args:
      shares: dropped, of 1, rising.
      accuracy: by the order's name, for each share, of 1.
      on_object: share of the patches that are on the object; marked.
      path: or an open file.
    """
    figure = Figure(_SIZE, dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    ax = figure.add_axes((0.075, 0.115, 0.69, 0.755))
    bare(ax, '')
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
    """A line for each share, a column for each order."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['dropped', *accuracy])
    for number, share in enumerate(shares):
        table.writerow([f'{share:.4f}', *(f'{values[number]:.4f}' for values in accuracy.values())])
    return text.getvalue()


def _label(ax, percent, accuracy):
    """Names the lines at their right ends, from the best down, none upon another."""
    lines = dict(zip(accuracy, (line for line in ax.get_lines() if line.get_label() in accuracy)))
    place = 2.0
    lowest = [index * _LINE for index in range(len(accuracy))]
    for name, least in zip(sorted(accuracy, key=lambda name: -accuracy[name][-1]), reversed(lowest)):
        place = max(min(accuracy[name][-1], place - _LINE), least)
        ax.annotate(name, (1, place), (10, 0), xycoords='axes fraction', textcoords='offset points',
                    color=lines[name].get_color(), fontsize=9.5, va='center', annotation_clip=False)
