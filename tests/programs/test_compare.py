"""The comparison of methods: what is run, what goes on from where, and what is said of it."""

import json
import sys

import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import compare_digits
from evit_jax import cli
from evit_jax.checkpoints.manager import newest_step
from evit_jax.comparison import running, verdict
from evit_jax.comparison.cells import Cell, cells_of, config_of
from tests.helpers import doors, layouts

compare = doors.imported('compare')


def small(**changes):
    """Two methods on the least model, with so few steps that nothing is learnt."""
    config = ConfigDict({
        'run': layouts.config_of(epochs=2, ema_decay=0.0), 'dense': '', 'seeds': (0,),
        'methods': {'EViT': {'model': {'fuse': True}}, 'random': {'reducer': {'name': 'random'}}},
        'untrained': {'methods': ('EViT', 'random'), 'shares': (0.8,), 'run': {}},
        'finetuned': {'methods': ('EViT',), 'shares': (0.8,), 'run': {'epochs': 1}},
        'scratch': {'methods': (), 'shares': (), 'run': {}},
        'orderings': ({'better': 'EViT', 'worse': 'random', 'setting': 'untrained'},)})
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def rows_of(setting, method, *top1, share=0.5):
    return [{'setting': setting, 'method': method, 'share': share, 'seed': seed, 'top1': value, 'images': 2000,
             'macs': 51, 'macs_dense': 100} for seed, value in enumerate(top1)]


def test_the_kept_comparison_has_every_method_in_every_setting_and_each_can_be_laid_out():
    config = compare_digits.get_config()
    cells = cells_of(config)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} == {*config.methods, 'dense'}
    for cell in cells:
        run = config_of(config, cell, 'DENSE')
        assert (run.seed, run.keep.macs) == (cell.seed, 0 if cell.method == 'dense' else cell.share)
        assert run.init_from == ('DENSE' if cell.setting == 'finetuned' else '')


@pytest.mark.parametrize('changes, said', [
    ({'untrained.methods': ('evvit',)}, "config.untrained.methods names 'evvit', and config.methods has EViT"),
    ({'finetuned.shares': (1.0,)}, r'config.finetuned.shares=\(1.0,\): 1.0 is outside \(0, 1\)'),
    ({'finetuned.shares': ()}, 'config.finetuned has methods and no shares'),
    ({'seeds': ()}, 'the comparison has no cells')])
def test_a_comparison_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        cells_of(small(**{key.replace('.', '__'): value for key, value in changes.items()}))


def test_every_cell_is_run_once_and_what_is_done_is_kept(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    config, trained = small(), []
    train = running.loop.train
    monkeypatch.setattr(running.loop, 'train', lambda config, folder: trained.append(folder) or train(config, folder))
    rows = running.compare(config, tmp_path)
    assert len(rows) == len(cells_of(config)) == 3 + 2 and len(trained) == 1 + 2
    assert all(0 <= row['top1'] <= 1 for row in rows)
    for row in rows:
        share = row['macs'] / row['macs_dense']
        assert share == pytest.approx(row['share'], abs=0.08) and (row['method'] != 'dense' or share == 1)
    assert newest_step(tmp_path / 'finetuned-evit-0.8-0') == 2
    (tmp_path / 'finetuned-evit-0.8-0' / 'done.json').unlink()
    trained.clear()
    assert running.compare(config, tmp_path) == rows and trained == [tmp_path / 'finetuned-evit-0.8-0']


def test_a_trained_dense_model_may_be_given(tmp_path, monkeypatch):
    layouts.prepare(monkeypatch)
    with pytest.raises(ValueError, match=r'config.dense=.*none holds no checkpoint: give the workdir'):
        running.compare(small(dense=str(tmp_path / 'none')), tmp_path)
    assert not list(tmp_path.iterdir())


def test_means_and_spreads_are_over_the_seeds():
    found = verdict.scores(rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'dense', 0.9, share=1.0))
    assert found[0].mean == pytest.approx(0.6) and found[0].spread == pytest.approx(0.1414, abs=1e-4)
    assert found[0].macs == 0.51 and found[1].spread == 0
    headers, lines = verdict.table(found, 'scratch')
    assert headers == ['from scratch', '50 % of MACs'] and lines == [['dense: 90.0', ''], ['A', '60.0 ± 14.1']]


@pytest.mark.parametrize('worse, said', [
    ((0.4, 0.6), 'holds (+10.0 points; +10.0, +10.0)'), ((0.6, 0.8), 'does not hold (-10.0'), ((0.4, 0.8), 'is open')])
def test_an_ordering_holds_where_every_seed_says_so(worse, said):
    found = verdict.scores(rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'B', *worse))
    line, = verdict.orderings(found, [{'better': 'A', 'worse': 'B', 'setting': 'scratch'}])
    assert line.startswith('A from scratch over B from scratch at 50 % of the MACs: ') and said in line


@pytest.mark.parametrize('better, said', [
    (0.905, 'is open (+0.5'), (0.92, 'holds (+2.0'), (0.895, 'is open (-0.5'), (0.88, 'does not hold (-2.0')])
def test_a_single_evaluation_tells_no_more_than_its_images_can(better, said):
    found = verdict.scores(rows_of('untrained', 'A', better) + rows_of('untrained', 'B', 0.9))
    assert found[1].error == pytest.approx(0.0067, abs=1e-4)
    assert said in verdict.orderings(found, [{'better': 'A', 'worse': 'B', 'setting': 'untrained'}])[0]


def test_training_is_compared_with_none_for_each_seed():
    found = verdict.scores(rows_of('finetuned', 'A', 0.5, 0.7) + rows_of('untrained', 'A', 0.45))
    claim = {'better': 'A', 'worse': 'A', 'setting': 'finetuned', 'worse_setting': 'untrained'}
    assert 'holds (+15.0 points; +5.0, +25.0)' in verdict.orderings(found, [claim])[0]


def test_seeds_are_paired_one_with_one_and_other_numbers_of_them_are_refused():
    assert verdict._differences((3.0,), (1.0, 2.0)) == [2, 1] and verdict._differences((3.0, 4.0), (1.0,)) == [2, 3]
    with pytest.raises(ValueError, match='3 seeds cannot be paired with 2'):
        verdict._differences((1.0, 2.0, 3.0), (1.0, 2.0))


def test_tables_plot_and_figures_are_written(tmp_path, compare):
    rows = rows_of('untrained', 'A', 0.5) + rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'B', 0.4, 0.6)
    compare.write(rows, [{'better': 'A', 'worse': 'B', 'setting': 'scratch'}], tmp_path)
    text = (tmp_path / 'compare.md').read_text()
    assert '| A | 60.0 ± 14.1 |' in text and 'holds' in text and 'compare.png' in text
    assert json.loads((tmp_path / 'compare.json').read_text())['rows'] == rows
    with Image.open(tmp_path / 'compare.png') as plot:
        assert plot.width > plot.height


def test_the_program_asks_for_what_it_needs(compare, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['compare'])
    with pytest.raises(SystemExit, match='2'):
        cli.run(compare.main)
    assert capsys.readouterr().err.startswith('error: give both --config FILE and --out DIR')


def test_cells_have_readable_names():
    assert str(Cell('finetuned', 'EViT, not fused', 0.5, 2)) == 'finetuned, EViT, not fused at 50 % of the MACs, seed 2'
    assert Cell('finetuned', 'EViT, not fused', 0.5, 2).name == 'finetuned-evit_not_fused-0.5-2'
