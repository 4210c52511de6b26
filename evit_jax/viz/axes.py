"""What plots have in common: colours, panels without a frame, and values written at the end of a line."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BLUE, GREEN, ORANGE, RED, PURPLE = '#2563b8', '#0f8a6b', '#d9661f', '#c4304f', '#7a4fb5'
INK, GREY, RULE = '#1f2329', '#7a828e', '#e6e9ee'


def bare(ax: Axes, title: str) -> None:
    """A panel with a title and faint lines across, and without a frame."""
    ax.set_title(title, loc='left', color=INK, fontsize=10, pad=11)
    ax.spines[['top', 'left', 'right']].set_visible(False)
    ax.spines['bottom'].set_color('#c9ced6')
    ax.tick_params(length=0, colors=GREY, labelsize=8.5, pad=5)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.grid(axis='y', color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)


def literal(name: str) -> str:
    """The name, so written that matplotlib sees no formula between dollars and hides no label that begins with _."""
    return ' ' * name.startswith('_') + name.replace('$', r'\$')


def write_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes (value, text, colour) at the right of the panel, each at its value unless another one is there."""
    low, high = ax.get_ylim()
    apart = 0.2 * (1 + max(text.count('\n') for _, text, _ in ends)) / (ax.bbox.height / ax.figure.dpi)
    place = 1.0
    for value, text, colour in sorted(ends, reverse=True):
        place = min((value - low) / (high - low), place)
        ax.annotate(text, (1, place), (8, 0), xycoords='axes fraction', textcoords='offset points', color=colour,
                    fontsize=9, va='center', linespacing=1.15, annotation_clip=False)
        place -= apart
