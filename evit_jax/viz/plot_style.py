"""Style of all plots: colours, panels without a frame, and values at the ends of lines."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

BLUE, GREEN, ORANGE, RED, PURPLE = '#2563b8', '#0f8a6b', '#d9661f', '#c4304f', '#7a4fb5'
INK, GREY, RULE = '#1f2329', '#7a828e', '#e6e9ee'


def style_panel(ax: Axes, title: str) -> None:
    """Sets the title of a panel, draws faint horizontal lines, and removes the frame."""
    ax.set_title(title, loc='left', color=INK, fontsize=10, pad=11)
    ax.spines[['top', 'left', 'right']].set_visible(False)
    ax.spines['bottom'].set_color('#c9ced6')
    ax.tick_params(length=0, colors=GREY, labelsize=8.5, pad=5)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.grid(axis='y', color=RULE, linewidth=0.8)
    ax.set_axisbelow(True)


def escape(name: str) -> str:
    """Escapes a label. Matplotlib would read text between dollars as a formula, and hide labels that begin with _."""
    return ' ' * name.startswith('_') + name.replace('$', r'\$')


def write_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes texts at the right of a panel, each at the height of its value. Texts that overlap are moved apart.

    Args:
      ends: (value, text, colour) of each text.
    """
    low, high = ax.get_ylim()
    spacing = 0.2 * (1 + max(text.count('\n') for _, text, _ in ends)) / (ax.bbox.height / ax.figure.dpi)
    height = 1.0
    for value, text, colour in sorted(ends, reverse=True):
        height = min((value - low) / (high - low), height)
        ax.annotate(text, (1, height), (8, 0), xycoords='axes fraction', textcoords='offset points', color=colour,
                    fontsize=9, va='center', linespacing=1.15, annotation_clip=False)
        height -= spacing
