"""The plots of a plan search, as SVG."""

import re

import pytest

from evit_jax.viz.search_plots import Point, error_plot, removed_plot, tokens_plot

TOKENS = {'searched': (64, 60, 40), 'ToMe': (64, 50, 45)}


def make_error_plot(series):
    return error_plot(series, error_name='KL', cost_name='MACs', cost_format='{:.0%}', name='macs')


@pytest.mark.parametrize('points', [1, 3])
def test_error_plot_labels_every_series_and_point(points):
    series = {name: [Point(0.3 + 0.1 * number, scale * 10.0**-number) for number in range(points)]
              for name, scale in (('searched', 1.0), ('EViT', 3.0))}
    plot = make_error_plot(series)
    texts = re.findall(r'<text [^>]*>([^<]*)</text>', plot)
    assert {'searched', 'EViT', *(f'{point.error:.3g}' for each in series.values() for point in each)} <= set(texts)


def test_error_plot_leaves_out_errors_of_zero():
    assert '>searched<' not in make_error_plot({'searched': [Point(0.5, 0.0)], 'EViT': [Point(0.5, 1.0)]})
    assert '<svg' in make_error_plot({'searched': [Point(0.5, 0.0)]})


def test_removed_plot_labels_counts_of_both_kinds():
    texts = re.findall(r'<text [^>]*>([^<]*)</text>', removed_plot((8, 4, 0), (0, 2, 0), name='removed'))
    assert {'merged 12', 'dropped 2', '8', '6'} <= set(texts)
    assert '<svg' in removed_plot((0, 0), (0, 0), name='none')


def test_plots_have_the_colours_of_the_page_and_ids_of_their_own():
    plots = [tokens_plot(TOKENS, name='a'), tokens_plot(TOKENS, name='b')]
    ids = [set(re.findall(r' id="([^"]*)"', plot)) for plot in plots]
    assert not ids[0] & ids[1]
    for plot in plots:
        assert 'var(--blue)' in plot and '#2563b8' not in plot and 'xmlns' not in plot
        assert 'aria-label="Patch tokens after each block. searched: 64, 60, 40; ToMe: 64, 50, 45"' in plot
