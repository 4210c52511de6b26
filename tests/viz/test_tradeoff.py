"""The plot of accuracy against cost."""

import pytest
from PIL import Image

from evit_jax.viz import tradeoff
from evit_jax.viz.tradeoff import Result


def test_tradeoff_plot_has_a_panel_for_each_known_cost(tmp_path):
    both, macs = Result('a', '1', 0.5, 10**9, 100.0), Result('a', '0.7', 0.4, 10**8, None)
    sizes, published = [], [Result('b', '0.5', 0.6, 10**9, 200.0)]
    for results in ([both, macs], [macs]):
        tradeoff.tradeoff_plot(results, tmp_path / 'x.png', published=published)
        with Image.open(tmp_path / 'x.png') as plot:
            sizes.append(plot.width)
    assert sizes[0] == 2 * sizes[1]
    with pytest.raises(ValueError, match='nothing to draw'):
        tradeoff.tradeoff_plot([Result('a', '1', None, 5, 5.0), Result('a', '1', 0.5, None, None)], tmp_path / 'x.png')


def test_names_with_special_characters_are_drawn_literally(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tradeoff.Figure, 'savefig', lambda figure, *_, **__: drawn.append(figure))
    results = [Result(name, '0.5', 0.9, 10**6, None) for name in ('$a_{', '_b', r'$\bad$')]
    tradeoff.tradeoff_plot(results, tmp_path / 'names.png')
    drawn[0].canvas.draw()
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [r'\$a_{', ' _b', r'\$\bad\$']
