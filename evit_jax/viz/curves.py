"""Plots the curves of a training run: loss, accuracy, keep rate and learning rate over the steps."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, INK, ORANGE, style_panel, write_ends

WINDOW = 0.03             # window of the loss's moving average, as a fraction of the number of points
WIDTH = 8.4               # inches
MARGINS = (0.62, 0.95, 0.5, 0.55)  # left, right (with the last values), top, bottom; inches
SPACE = 0.52              # between two panels; inches

Curve = tuple[np.ndarray, np.ndarray]  # steps [N], values [N] float64, N >= 1


def training_curves(records: Sequence[Mapping[str, float]], path: str | os.PathLike | BinaryIO,
                    title: str | None = None) -> None:
    """Draws a PNG with panels for loss, accuracy, keep rate and learning rate. Panels without data are left out.

    Args:
      records: one mapping per step, as returned by `metrics.writers.read_metrics`. The keys that are drawn are
        'train/loss', 'eval/top1' and 'eval/top1_ema' (fractions), 'train/keep_rate' and 'train/lr'. Values that are not
        finite are skipped.
      path: path of the PNG, or an open file.

    Raises:
      ValueError: `records` hold none of these values.
    """
    curves = {name: curve(records, name) for panel in PANELS for name in panel.names}
    curves = {name: (steps, values) for name, (steps, values) in curves.items() if len(steps)}
    panels = [panel for panel in PANELS if curves.keys() & set(panel.names)]
    if not panels:
        raise ValueError(f'nothing to draw: no record holds {", ".join(n for panel in PANELS for n in panel.names)}')
    heights = [panel.height for panel in panels]
    left, right, top, bottom = MARGINS
    top += 0.4 if title else 0
    height = sum(heights) + SPACE * (len(panels) - 1) + top + bottom
    figure = Figure((WIDTH, height), dpi=150, facecolor='white')
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False, gridspec_kw={
        'height_ratios': heights, 'hspace': SPACE * len(panels) / sum(heights), 'left': left / WIDTH,
        'right': 1 - right / WIDTH, 'top': 1 - top / height, 'bottom': bottom / height})[:, 0]
    last = max(steps[-1] for steps, _ in curves.values())
    for ax, panel in zip(axes, panels):
        style_panel(ax, panel.title)
        ax.set_xlim(0, max(last, 1))
        panel.draw(ax, curves)
    axes[-1].set_xlabel('step', color=GREY, fontsize=9)
    axes[-1].xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda step, _: f'{step:,.0f}'))
    if title:
        figure.text(left / WIDTH, 1 - 0.3 / height, title, color=INK, fontsize=13, va='center')
    figure.savefig(path, format='png')


def curve(records: Sequence[Mapping[str, float]], name: str) -> Curve:
    """Returns the steps [N] and the finite values [N] of a metric; N is 0 if it was not recorded."""
    points = [(record['step'], record[name]) for record in records if math.isfinite(record.get(name, math.nan))]
    steps, values = np.array(points, np.float64).reshape(-1, 2).T
    return steps, values


def smoothed(values: np.ndarray, window: float) -> np.ndarray:
    """Returns the weighted mean of about `window` neighbours on both sides, [N]. It does not lag behind a trend."""
    reach = min(math.ceil(window), len(values) - 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(window / 2.5, 1e-3)) ** 2)
    # The ends have fewer neighbours, so the weights are normalised.
    total, weight = (np.convolve(x, weights)[reach:reach + len(values)] for x in (values, np.ones(len(values))))
    return total / weight


def _draw_loss(ax: Axes, curves: Mapping[str, Curve]) -> None:
    steps, raw = curves['train/loss']
    smooth = smoothed(raw, WINDOW * len(raw))
    ax.plot(steps, raw, color=BLUE, alpha=0.25, linewidth=0.8)
    ax.plot(steps, smooth, color=BLUE, linewidth=1.6, **_dot_if_single(steps))
    low, high = raw.min(), max(smooth.max(), np.quantile(raw, 0.98))  # a spike must not flatten the curve
    pad = 0.06 * (high - low) or 0.5
    ax.set_ylim(low - pad, high + pad)
    write_ends(ax, [(smooth[-1], f'{smooth[-1]:#.3g}', BLUE)])


def _draw_accuracy(ax: Axes, curves: Mapping[str, Curve]) -> None:
    ends = []
    drawn = [(name, label, colour) for name, label, colour in (
        ('eval/top1', 'weights', GREEN), ('eval/top1_ema', 'EMA', ORANGE)) if name in curves]
    for name, label, colour in drawn:
        steps, values = curves[name]
        ax.plot(steps, 100 * values, color=colour, linewidth=1.6, marker='o', markersize=3, clip_on=False)
        ends.append((100 * values[-1], f'{100 * values[-1]:.1f} %\n{label}', colour))
    low = min(100 * curves[name][1].min() for name, _, _ in drawn)
    ax.set_ylim(max(0, low - 5), 100)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g} %'))
    write_ends(ax, ends)


def _draw_keep_rate(ax: Axes, curves: Mapping[str, Curve]) -> None:
    steps, values = curves['train/keep_rate']
    ax.step(steps, values, where='post', color=INK, linewidth=1.4, **_dot_if_single(steps))
    ax.fill_between(steps, values, step='post', color=INK, alpha=0.05, linewidth=0)
    ax.set_ylim(0, 1.05)
    ax.set_yticks((0, 0.5, 1))
    write_ends(ax, [(values[-1], f'{values[-1]:.2f}', INK)])


def _draw_lr(ax: Axes, curves: Mapping[str, Curve]) -> None:
    steps, values = curves['train/lr']
    peak = int(values.argmax())
    ax.plot(steps, values, color=GREY, linewidth=1.2, **_dot_if_single(steps))
    ax.fill_between(steps, values, color=GREY, alpha=0.08, linewidth=0)
    ax.set_ylim(0, 1.15 * values[peak] or 1)
    ax.set_yticks((0, values[peak]), ('0', _power(values[peak])))
    write_ends(ax, [(values[-1], _power(values[-1]), GREY)])


class _Panel(NamedTuple):
    title: str
    height: float  # inches
    names: tuple[str, ...]
    draw: Callable[[Axes, Mapping[str, Curve]], None]


PANELS = (
    _Panel('Training loss', 2.2, ('train/loss',), _draw_loss),
    _Panel('Accuracy, evaluation', 2.2, ('eval/top1', 'eval/top1_ema'), _draw_accuracy),
    _Panel('Keep rate', 1.0, ('train/keep_rate',), _draw_keep_rate),
    _Panel('Learning rate', 0.8, ('train/lr',), _draw_lr),
)


def _dot_if_single(steps: np.ndarray) -> dict:
    """Returns the style of a dot if there is only one point: a line through one point is invisible."""
    return {'marker': 'o', 'markersize': 4, 'clip_on': False} if len(steps) == 1 else {}


def _power(value: float) -> str:
    """Formats a number as 1e-3 or 2.5e-4."""
    digits, exponent = f'{value:.1e}'.split('e')
    return f'{float(digits):g}e{int(exponent)}' if value else '0'
