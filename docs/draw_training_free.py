"""Draws docs/training_free.svg from the table of methods in docs/training_free.md.

    python -m docs.draw_training_free
"""

import itertools
import pathlib
import re

from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator

from evit_jax.viz.plot_style import BLUE, GREEN, GREY, ORANGE, RED, style_panel

DOCS = pathlib.Path(__file__).parent
COLOURS = {'searched plan': BLUE, 'ward, falling numbers': GREEN, 'ToMe, equal numbers': ORANGE, 'EViT': RED}
MARKERS = 'osD^vP*Xd<>phH'


def read_table(page: str) -> dict[str, dict[str, list[float]]]:
    """Reads the table of methods: method -> column -> values at the shares of the MACs in the header.

    A value that the page marks as bold is read as a number, too.
    """
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in page.splitlines() if line.startswith('|')]
    first = next(index for index, row in enumerate(rows) if row[0] == 'method')
    header, methods = rows[first], {}
    for row in itertools.takewhile(lambda row: len(row) == len(header), rows[first + 2:]):
        methods[row[0].replace('`', '')] = {name: [float(number) for number in re.findall(r'\d+(?:\.\d+)?', cell)]
                                            for name, cell in zip(header[1:], row[1:])}
    return methods


def draw(methods: dict[str, dict[str, list[float]]]) -> Figure:
    """Draws error and k-NN accuracy against speed, one line for each method."""
    methods = dict(methods)
    dense = methods.pop('dense')
    figure = Figure((9.5, 4.6), layout='constrained')
    error, knn = figure.subplots(1, 2)
    for marker, (name, columns) in zip(itertools.cycle(MARKERS), methods.items()):
        colour = COLOURS.get(name, GREY)
        style = {'color': colour, 'marker': marker, 'markersize': 6 if name in COLOURS else 4.5, 'label': name,
                 'linewidth': 2 if name in COLOURS else 0.8, 'zorder': 3 if name in COLOURS else 2}
        error.plot(columns['speed'], columns['error'], **style)
        knn.plot(columns['speed'], columns['k-NN, %'], **style)
    style_panel(error, 'Error, 100 (1 - cosine)')
    error.set_yscale('log')
    error.set_yticks([0.3, 1, 3, 10, 30], ['0.3', '1', '3', '10', '30'])
    error.minorticks_off()
    style_panel(knn, 'k-NN accuracy, %')
    knn.axhline(dense['k-NN, %'][0], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    knn.annotate('dense', (1, dense['k-NN, %'][0]), (-2, 4), xycoords=('axes fraction', 'data'),
                 textcoords='offset points', color=GREY, fontsize=8.5, ha='right')
    for panel in (error, knn):
        panel.set_xlabel('measured speed, relative to dense', color=GREY, fontsize=9)
        panel.xaxis.set_major_locator(MultipleLocator(0.5))
        panel.xaxis.set_major_formatter('{x:g}x')
    figure.legend(*error.get_legend_handles_labels(), loc='outside right center', frameon=False, fontsize=8.5)
    return figure


if __name__ == '__main__':
    table = read_table((DOCS / 'training_free.md').read_text())
    draw(table).savefig(DOCS / 'training_free.svg', metadata={'Date': None})
