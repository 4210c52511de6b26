"""Comparisons of methods: their cells, resuming them, and the report."""

import json
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from evit_jax import cli
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step
from evit_jax.comparison import recording, running, verdict
from evit_jax.comparison.cells import Cell, cells_of, config_of
from evit_jax.configs import compare_digits, compare_real, compare_scratch
from evit_jax.data.sources import ArraySource
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.registry import get_reducer
from evit_jax.training import checks
from tests.helpers import layouts, program_modules

compare = program_modules.module_fixture('compare')


@pytest.fixture(autouse=True)
def keep_programs(monkeypatch):
    """Keeps the programs between cells. The cells here are of one tiny model."""
    monkeypatch.setattr(jax, 'clear_caches', lambda: None)


def small(**changes):
    """Returns the config of a comparison of two methods on a tiny model, with a few steps."""
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
             'macs': 51, 'macs_dense': 100, 'seconds': 90 + 60 * seed} for seed, value in enumerate(top1)]


@pytest.mark.parametrize('recipe', [compare_digits, compare_scratch])
def test_cells_of_the_recipe_cover_every_method_and_have_a_config(recipe):
    config = recipe.get_config()
    cells = cells_of(config)
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.method for cell in cells} == {*config.methods, 'dense'}
    for cell in cells:
        run = config_of(config, cell, 'DENSE')
        assert (run.seed, run.keep.macs) == (cell.seed, 0 if cell.method == 'dense' else cell.share)
        assert run.init_from == ('DENSE' if cell.setting == 'finetuned' else '')


def test_cells_of_the_recipe_on_photographs_have_shares_and_orderings_of_cells():
    config = compare_real.get_config()
    cells = cells_of(config)
    assert len({cell.name for cell in cells}) == len(cells)
    keys = {(cell.setting, cell.method, cell.share) for cell in cells}
    assert ('finetuned', 'EViT, 126 px', 0.6) in keys and ('finetuned', 'EViT, 126 px', 0.5) not in keys
    short = next(cell for cell in cells if cell.method == 'EViT, 1 epoch')
    assert config_of(config, short, 'DENSE').epochs == 1 and config_of(config, cells[0], 'DENSE').epochs == 3


@pytest.mark.parametrize('recipe', [compare_digits, compare_real, compare_scratch])
def test_orderings_of_the_recipe_compare_cells_it_has(recipe):
    config = recipe.get_config()
    keys = {(cell.setting, cell.method, cell.share) for cell in cells_of(config)}
    for ordering in config.orderings:
        share = ordering.get('share', 0.5)
        assert (ordering.setting, ordering.better, share) in keys
        assert (ordering.get('worse_setting', ordering.setting), ordering.worse,
                ordering.get('worse_share', share)) in keys


def test_recipe_from_scratch_passes_the_checks_of_training():
    config = compare_scratch.get_config()
    for cell in cells_of(config):
        checks.check_training(workdirs.flat(config_of(config, cell, '')))


def test_compare_with_features_plans_and_records_runs_each_cell(tmp_path, compare):
    config = small(seeds=(0,), finetuned__methods=(), record=5, knn=ConfigDict(
        {'methods': ('random',), 'shares': (0.8,), 'run': {}}))
    config.probe = config.knn
    plan = make_plan(16, 2, tokens=(10, 6), reduce_at=(0, 1), reducer=get_reducer('tome'))
    plans = {(compare.SEARCHED, 0.6): PlanFile.of(plan, 'vit_layouts', 16, reducer='tome')}
    model_config = layouts.model_of(config.run)
    config = compare.with_plans(config, plans)
    rows = running.compare(config, tmp_path, sources=layouts.sources(), model_config=model_config, plans=plans)
    by_key = {(row['setting'], row['method']): row for row in rows}
    assert set(by_key) == {(setting, method) for setting in ('knn', 'probe', 'untrained') for method in (
        'dense', 'random', 'searched plan')} | {('untrained', 'EViT')}
    assert all(by_key[setting, 'searched plan']['macs'] == model_config.macs(plan) for setting in ('knn', 'untrained'))
    assert all(0 <= row['top1'] <= 1 for row in rows)
    record = recording.read(tmp_path / 'untrained-searched_plan-0.6-0')
    assert record.groups.shape == (2, 5, 16) and record.blocks.tolist() == [0, 1] and record.grid.tolist() == [4, 4]
    assert len(set(record.groups[1, 0].tolist())) == 6


@pytest.mark.parametrize('text', ['0.5', '1.5=plan.json', 'x=plan.json', '0.5='])
def test_parse_plan_without_share_and_file_raises(text, compare):
    with pytest.raises(ValueError, match='is not SHARE=FILE'):
        compare.parse_plan(text)


def test_orderings_at_two_costs_compare_the_named_shares(tmp_path):
    scores = verdict.scores(rows_of('finetuned', 'A', 0.9, share=0.6) + rows_of('finetuned', 'A', 0.5, share=0.5)
                            + rows_of('finetuned', 'dense', 0.8, share=1.0))
    line, = verdict.orderings(scores, [{'better': 'A', 'worse': 'dense', 'setting': 'finetuned', 'share': 0.6,
                                        'worse_share': 1.0}])
    assert 'at 60 % of the MACs and 100 %: confirmed (+10.0 points' in line


@pytest.mark.parametrize('changes, message', [
    ({'untrained.methods': ('evvit',)}, "config.untrained.methods names 'evvit', and config.methods has EViT"),
    ({'finetuned.shares': (1.0,)}, r'config.finetuned.shares=\(1.0,\): 1.0 is outside \(0, 1\)'),
    ({'finetuned.shares': ()}, 'config.finetuned has methods and no shares'),
    ({'seeds': ()}, 'the comparison has no cells')])
def test_cells_of_bad_config_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        cells_of(small(**{key.replace('.', '__'): value for key, value in changes.items()}))


def test_compare_runs_every_cell_once_and_resumes_unfinished_ones(tmp_path, monkeypatch):
    config, trained = small(), []
    train = running.loop.train
    objects = {'sources': layouts.sources(), 'model_config': layouts.model_of(config.run)}

    def recorded_train(config, folder, **kwargs):
        trained.append(folder)
        return train(config, folder, **kwargs)

    monkeypatch.setattr(running.loop, 'train', recorded_train)
    rows = running.compare(config, tmp_path, **objects)
    assert len(rows) == len(cells_of(config)) == 3 + 2 and len(trained) == 1 + 2
    assert all(0 <= row['top1'] <= 1 for row in rows)
    for row in rows:
        share = row['macs'] / row['macs_dense']
        assert share == pytest.approx(row['share'], abs=0.08) and (row['method'] != 'dense' or share == 1)
    assert newest_step(tmp_path / 'finetuned-evit-0.8-0') == 2
    (tmp_path / 'finetuned-evit-0.8-0' / 'done.json').unlink()
    trained.clear()
    again = running.compare(config, tmp_path, **objects)
    assert [row | {'seconds': 0} for row in again] == [row | {'seconds': 0} for row in rows] and trained == [
        tmp_path / 'finetuned-evit-0.8-0']
    with config.run.unlocked():
        config.run.log.pictures = 1  # decides no result
    assert len(running.compare(config, tmp_path, **objects)) == len(rows)
    with config.run.unlocked():
        config.run.optimizer.lr *= 2
    with pytest.raises(ValueError, match=r'0 holds the result of other settings .*: give another --out, or remove the'):
        running.compare(config, tmp_path, **objects)


def test_compare_with_other_images_refuses_the_finished_cells(tmp_path):
    config = small(finetuned__methods=(), untrained__methods=('random',))
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (64, 16, 16, 3), np.uint8), np.arange(64) % 3
    objects = {'model_config': layouts.model_of(config.run)}
    source = ArraySource(images, labels)
    rows = running.compare(config, tmp_path, sources=(source, source), **objects)
    assert running.compare(config, tmp_path, sources=(source, source), **objects) == rows
    other = ArraySource(255 - images, labels)
    with pytest.raises(ValueError, match=r'holds the result of other settings .*data'):
        running.compare(config, tmp_path, sources=(source, other), **objects)


def test_compare_with_another_folder_of_images_refuses_the_finished_cells(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (('train', 64), ('val', 6)):
        for number in range(count):
            path = tmp_path / 'images' / split / 'abc'[number % 3] / f'{number}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    config = small(finetuned__methods=(), untrained__methods=('random',), run__data__source='folder',
                   run__data__path=str(tmp_path / 'images'))
    model_config = layouts.model_of(config.run)
    rows = running.compare(config, tmp_path / 'out', model_config=model_config)
    assert running.compare(config, tmp_path / 'out', model_config=model_config) == rows
    next((tmp_path / 'images' / 'val' / 'b').iterdir()).unlink()
    with pytest.raises(ValueError, match=r'holds the result of other settings .*data'):
        running.compare(config, tmp_path / 'out', model_config=model_config)


def test_compare_with_a_missing_dense_model_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(ValueError, match=r'config.dense=.*none holds no checkpoint: give the workdir'):
        running.compare(small(dense=str(tmp_path / 'none')), tmp_path)
    assert not list(tmp_path.iterdir())


def test_scores_average_over_the_seeds():
    scores = verdict.scores(rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'dense', 0.9, share=1.0))
    assert scores[0].mean == pytest.approx(0.6) and scores[0].spread == pytest.approx(0.1414, abs=1e-4)
    assert scores[0].macs == 0.51 and scores[1].spread == 0
    headers, lines = verdict.table(scores, 'scratch')
    assert headers == ['from scratch', '50 % of MACs'] and lines == [['dense: 90.0', ''], ['A', '60.0 ± 14.1']]


@pytest.mark.parametrize('worse, verdict_text', [
    ((0.4, 0.6), 'confirmed (+10.0 points; by seed +10.0, +10.0)'), ((0.6, 0.8), 'contradicted (-10.0'),
    ((0.4, 0.8), 'undecided')])
def test_orderings_are_confirmed_if_they_hold_for_every_seed(worse, verdict_text):
    scores = verdict.scores(rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'B', *worse))
    line, = verdict.orderings(scores, [{'better': 'A', 'worse': 'B', 'setting': 'scratch'}])
    assert line.startswith('A (from scratch) is better than B (from scratch) at 50 % of the MACs: ')
    assert verdict_text in line


@pytest.mark.parametrize('better, verdict_text', [
    (0.905, 'undecided (+0.5'), (0.92, 'confirmed (+2.0'), (0.895, 'undecided (-0.5'), (0.88, 'contradicted (-2.0')])
def test_orderings_of_one_evaluation_are_undecided_within_its_standard_error(better, verdict_text):
    scores = verdict.scores(rows_of('untrained', 'A', better) + rows_of('untrained', 'B', 0.9))
    assert scores[1].error == pytest.approx(0.0067, abs=1e-4)
    assert verdict_text in verdict.orderings(scores, [{'better': 'A', 'worse': 'B', 'setting': 'untrained'}])[0]


def test_orderings_across_settings_pair_one_evaluation_with_every_seed():
    scores = verdict.scores(rows_of('finetuned', 'A', 0.5, 0.7) + rows_of('untrained', 'A', 0.45))
    claim = {'better': 'A', 'worse': 'A', 'setting': 'finetuned', 'worse_setting': 'untrained'}
    assert 'confirmed (+15.0 points; by seed +5.0, +25.0)' in verdict.orderings(scores, [claim])[0]


def test_differences_of_other_numbers_of_seeds_are_refused():
    assert verdict._differences((3.0,), (1.0, 2.0)) == [2, 1] and verdict._differences((3.0, 4.0), (1.0,)) == [2, 3]
    with pytest.raises(ValueError, match='3 seeds cannot be paired with 2'):
        verdict._differences((1.0, 2.0, 3.0), (1.0, 2.0))


def test_write_report_writes_tables_plot_and_json(tmp_path, compare):
    rows = rows_of('untrained', 'A', 0.5) + rows_of('scratch', 'A', 0.5, 0.7) + rows_of('scratch', 'B', 0.4, 0.6)
    compare.write_report(rows, [{'better': 'A', 'worse': 'B', 'setting': 'scratch'}], tmp_path)
    text = (tmp_path / 'compare.md').read_text()
    assert '| A | 60.0 ± 14.1 |' in text and 'confirmed' in text and 'compare.png' in text
    assert 'Cells: 1. Minutes of a cell, since its last start: 1.5 to 1.5, in all 2.' in text
    assert 'Cells: 4. Minutes of a cell, since its last start: 1.5 to 2.5, in all 8.' in text
    assert json.loads((tmp_path / 'compare.json').read_text())['rows'] == rows
    with Image.open(tmp_path / 'compare.png') as plot:
        assert plot.width > plot.height


def test_compare_without_config_or_out_ends_with_an_error(compare, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['compare'])
    with pytest.raises(SystemExit, match='2'):
        cli.run(compare.main)
    assert capsys.readouterr().err.startswith('error: give both --config FILE and --out DIR')


def test_cell_has_a_readable_name():
    assert str(Cell('finetuned', 'EViT, not fused', 0.5, 2)) == 'finetuned, EViT, not fused at 50 % of the MACs, seed 2'
    assert Cell('finetuned', 'EViT, not fused', 0.5, 2).name == 'finetuned-evit_not_fused-0.5-2'
