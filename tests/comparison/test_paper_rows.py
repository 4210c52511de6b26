"""The rows of the paper's tables: multiply-accumulates, parameters and training commands."""

import pytest

from evit_jax.comparison.paper_rows import TABLES, PaperRow, published

ROWS = [row for rows in TABLES.values() for row in rows]
# Multiply-accumulates in 10^9 at keep rates 1, 0.9, ..., 0.5, with fusion.
GMACS = {'deit_t': (1.25, 1.09, 0.94, 0.82, 0.72, 0.63), 'deit_s': (4.60, 4.02, 3.48, 3.03, 2.64, 2.31),
         'deit_b': (17.56, 15.40, 13.33, 11.61, 10.09, 8.82), 'lvvit_s': (6.55, None, None, 4.71, None, 3.88)}
LARGE = [('deit_s', 0.7, 272, 4.56), ('deit_s', 0.6, 288, 4.50), ('deit_s', 0.5, 304, 4.44),
         ('lvvit_s', 1.0, 448, 31.8), ('lvvit_s', 0.7, 448, 21.5)]


@pytest.mark.parametrize('row', [row for row in ROWS if row.gmacs], ids=lambda row: f'{row.table}-{row.name}')
def test_row_has_the_macs_of_the_paper(row):
    # The paper has one figure for both forms; without fusion a model needs up to 0.06 G fewer.
    assert row.macs / 1e9 == pytest.approx(row.gmacs, abs=0.051 if row.fuse else 0.06)


@pytest.mark.parametrize('model', GMACS)
def test_model_has_the_macs_of_every_keep_rate(model):
    for rate, gmacs in zip((1.0, 0.9, 0.8, 0.7, 0.6, 0.5), GMACS[model]):
        assert gmacs is None or round(PaperRow('', model, rate).macs / 1e9, 2) == gmacs


@pytest.mark.parametrize('model, rate, size, gmacs', LARGE)
def test_model_at_a_higher_resolution_has_the_macs_of_the_paper(model, rate, size, gmacs):
    digits = len(str(gmacs).partition('.')[2])
    assert PaperRow('', model, rate, size=size).macs / 1e9 == pytest.approx(gmacs, abs=0.51 * 10**-digits)


def test_rows_have_the_parameters_of_the_paper():
    parameters = {(row.model, row.reducer, row.size): row.parameters for row in ROWS}
    assert parameters['deit_s', 'evit', 224] == 22_050_664
    assert parameters['deit_s', 'dynamicvit', 224] == 22_774_414
    assert [parameters['lvvit_s', 'evit', size] for size in (224, 384, 448)] == [26_151_824, 26_297_744, 26_377_616]


def test_rows_of_a_table_have_distinct_names_and_starts_that_are_rows():
    for rows in TABLES.values():
        assert len({row.name for row in rows}) == len(rows)
    weights = {row.weights for row in ROWS}
    assert {row.start for row in ROWS} - {''} <= weights


def test_commands_name_the_recipe_and_the_values_of_the_row():
    row = TABLES['no_fusion'][2]
    assert row.command('in', 'w') == (
        'python -m evit_jax.main --config configs/deit_s.py --workdir runs/paper/deit_s-0.7-not-fused-224 '
        '--config.data.source=folder --config.data.path=in --config.keep.rate=0.7 --config.epochs=300 '
        '--config.model.fuse=False')
    commands = [row.command('in', 'w') for row in TABLES['dynamicvit']]
    assert 'configs/dynamicvit_s.py' in commands[0] and '--config.init_from=w/deit_s-1-224' in commands[0]
    assert 'configs/deit_s_finetune.py' in commands[2] and '--config.epochs=100' in commands[2]
    assert '--config.distill.kind=none' in commands[6]
    assert not any(row.command('in', 'w') for row in TABLES['training_free'])


def test_published_results_have_the_figures_of_the_rows():
    results = {(result.series, result.label): result for result in published()}
    assert len(results) == 6 + 3 + 2
    assert results['EViT-DeiT-S', 'DeiT-S'][2:5] == (pytest.approx(0.798), 4_600_000_000, 2923)
    assert results['EViT-LV-ViT-S', '0.5'].top1 == 0.825 and results['DynamicViT-DeiT-S', '0.5'].top1 == 0.775
