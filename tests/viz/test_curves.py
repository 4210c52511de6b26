"""The curves of a training run."""

import numpy as np
import pytest
from PIL import Image

from evit_jax.viz import curves
from evit_jax.viz.curves import training_curves

RECORDS = [{'step': step, 'train/loss': 2.5 - step / 50, 'train/lr': 1e-3, 'train/keep_rate': 1 - step / 400}
           for step in range(10, 101, 10)]
RECORDS += [{'step': 50, 'eval/top1': 0.5, 'eval/top1_ema': 0.4},
            {'step': 100, 'eval/top1': 0.951, 'eval/top1_ema': 0.9625}]


@pytest.fixture
def ends(monkeypatch):
    """The texts that are written at the ends of the curves."""
    written, write = [], curves.write_ends

    def record(ax, ends):
        written.extend(text for _, text, _ in ends)
        write(ax, ends)

    monkeypatch.setattr(curves, 'write_ends', record)
    return written


def test_training_curves_write_the_last_value_of_each_series(tmp_path, ends):
    training_curves(RECORDS, tmp_path / 'curves.png', title='a run')
    assert ends[1:] == ['95.1 %\nweights', '96.2 %\nEMA', '0.75', '1e-3']
    with Image.open(tmp_path / 'curves.png') as picture:
        assert len(picture.convert('RGB').getcolors(1 << 20)) > 50


def test_training_curves_without_a_series_leave_out_its_panel(tmp_path, ends):
    sizes = []
    for names in (['train/loss', 'train/keep_rate'], ['train/loss']):
        records = [{name: value for name, value in record.items() if name in ['step', *names]} for record in RECORDS]
        training_curves(records, tmp_path / 'curves.png')
        with Image.open(tmp_path / 'curves.png') as picture:
            sizes.append(picture.height)
    assert len(ends) == 3 and sizes[0] > sizes[1]
    with pytest.raises(ValueError, match='nothing to draw: no record holds train/loss'):
        training_curves([{'step': 1, 'train/images_per_second': 3.0}], tmp_path / 'curves.png')


def test_training_curves_skip_values_that_are_not_finite(tmp_path):
    records = [{'step': 1, 'train/loss': float('nan')}, {'step': 2, 'train/loss': 2.0}, {'step': 3}]
    steps, values = curves.curve(records, 'train/loss')
    assert (steps.tolist(), values.tolist()) == ([2], [2])
    training_curves(records, tmp_path / 'curves.png')


def test_smoothed_keeps_a_slope_and_reduces_noise():
    slope = np.linspace(5, 1, 200)
    np.testing.assert_allclose(curves.smoothed(slope, 10)[15:-15], slope[15:-15])
    np.testing.assert_allclose(curves.smoothed(np.full(7, 3.0), 10), 3)
    noise = np.random.default_rng(0).normal(size=200)
    assert curves.smoothed(noise, 10).std() < 0.5 * noise.std()
