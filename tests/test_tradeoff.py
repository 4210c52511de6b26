"""Accuracy against cost: what is read of runs and measurements, and the plot of it."""

import json

import pytest
from PIL import Image

from evit_jax import models
from evit_jax.benchmarks.results import read_results
from evit_jax.pictures import tradeoff
from evit_jax.pictures.published import PUBLISHED
from evit_jax.pictures.result import Result
from evit_jax.tokens.plan import make_plan
from evit_jax.training import writers


def make_run(folder, *, macs=1000, top1=0.5, **config):
    folder.mkdir()
    writer = writers.JsonlWriter(folder / writers.METRICS_FILE)
    writer.write_scalars(1, {'eval/top1': 0.1})
    writer.write_scalars(2, {'eval/top1': top1, 'eval/macs': macs, 'eval/images_per_second': 7, 'eval/top1_ema': 0.6})
    writer.close()
    (folder / 'config.json').write_text(json.dumps({'model.name': 'vit', 'keep.rate': 0.7} | config))
    return folder


def make_rows(file, *rows):
    file.write_text(json.dumps({'machine': {}, 'rows': rows}))
    return file


def test_results_are_read_from_runs_and_measurements(tmp_path):
    run_of = make_run(tmp_path / 'run', **{'keep.rates': [0.9, 0.5], 'model.fuse': False})
    rows = make_rows(tmp_path / 'a.json', {'model': 'deit_s', 'rate': 0.5, 'top1': 78.5, 'macs': 5e9},
                     {'name': 'mine', 'top1': 0.8, 'images_per_second': 12.0})
    assert read_results([run_of, rows]) == ([
        Result('vit, not fused', '0.9/0.5', 0.5, 1000, 7), Result('deit_s', '0.5', 0.785, 5e9, None, True),
        Result('mine', 'mine', 0.8, None, 12.0, True)], 0)
    assert read_results([run_of / 'metrics.jsonl'], ema=True)[0][0].top1 == 0.6


def test_a_speed_of_ours_goes_to_the_run_of_the_same_macs(tmp_path):
    measured = [{'model': 'vit', 'macs': macs, 'images_per_second': speed}
                for macs, speed in ((1000, 3), (1000, 5), (1000, 4), (999, 100))]
    measured += [{'macs': 1000, 'step': 'train', 'images_per_second': 50},
                 {'macs': 1000, 'engine': 'torch', 'images_per_second': 60}]
    results, lost = read_results([make_rows(tmp_path / 'a.json', *measured), make_run(tmp_path / 'run')])
    assert [(result.label, result.speed) for result in results] == [('0.7', 5)] and lost == 1


def test_the_plot_has_a_panel_for_each_cost_that_is_known(tmp_path):
    both, macs = Result('a', '1', 0.5, 10**9, 100.0), Result('a', '0.7', 0.4, 10**8, None)
    sizes = []
    for results in ([both, macs], [macs]):
        tradeoff.tradeoff_plot(results, tmp_path / 'x.png', published=PUBLISHED)
        with Image.open(tmp_path / 'x.png') as plot:
            sizes.append(plot.width)
    assert sizes[0] == 2 * sizes[1]
    with pytest.raises(ValueError, match='nothing to draw'):
        tradeoff.tradeoff_plot([Result('a', '1', None, 5, 5.0), Result('a', '1', 0.5, None, None)], tmp_path / 'x.png')


def test_our_models_cost_what_is_published():
    shape = models.named_shape('deit_s')
    for result in PUBLISHED:
        if result.series == 'EViT-DeiT-S':
            rate = float(result.label) if result.label != 'DeiT-S' else 1.0
            assert shape.macs(make_plan(196, 12, rate=rate)) == pytest.approx(result.macs, rel=0.02)
