"""The program that regenerates the paper's tables: tables without data, and an evaluation on a made-up ImageNet."""

import json
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

import evit_jax
from evit_jax import cli
from evit_jax.comparison.paper_rows import TABLES
from tests.helpers import program_modules

paper = program_modules.module_fixture('paper')


@pytest.fixture
def run(paper, monkeypatch, capsys):
    """Returns a function that runs the program with some flags and returns its output."""
    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['paper', *words])
        monkeypatch.setattr(cli, 'configure_logging', lambda: None)
        with flagsaver.flagsaver():
            cli.run(paper.main)
        return capsys.readouterr().out

    return run


def test_paper_without_data_writes_all_tables_and_commands(run, tmp_path):
    text = run('--table=all', f'--out={tmp_path}')
    assert all(f'## {name}\n' in text for name in (*TABLES, 'motivation', 'tradeoff'))
    row = '| EViT 0.7, 300 epochs | deit_s-0.7-fused-224 | 224 | 3.0 | 3.03 | 22.05 | 79.5 |  | 94.8 |  | 1.50x |'
    assert row in text
    assert text.count('python -m evit_jax.main') == sum(bool(row.epochs) for rows in TABLES.values() for row in rows)
    rows = json.loads((tmp_path / 'paper.json').read_text())['rows']
    assert all(row['measured'] is None for row in rows) and (tmp_path / 'paper.md').read_text() + '\n' == text
    dense = next(row for row in rows if row['table'] == 'deit' and row['rate'] == 1)
    assert dense['device_hours'] == pytest.approx(6 * dense['macs'] * 1_281_167 * 300 / 1e14 / 3600)


def test_paper_with_an_unknown_table_or_data_ends_with_an_error(paper, monkeypatch, capsys, tmp_path):
    for words, message in ((['--table=deitt'], '--table=deitt is no table: there are training_free'),
                           ([f'--data={tmp_path}'], 'has no folder val: give a folder with train/CLASS/')):
        monkeypatch.setattr(sys, 'argv', ['paper', f'--out={tmp_path}', *words])
        with flagsaver.flagsaver(), pytest.raises(SystemExit, match='2'):
            cli.run(paper.main)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_paper_on_a_made_up_imagenet_evaluates_every_row_with_weights(run, tmp_path):
    names, rng = tuple(f'n{number:08d}' for number in range(5)), np.random.default_rng(0)
    for name in names:
        (tmp_path / 'in' / 'val' / name).mkdir(parents=True)
        for number in range(4):
            image = Image.fromarray(rng.integers(0, 256, (240, 260, 3), np.uint8))
            image.save(tmp_path / 'in' / 'val' / name / f'{number}.jpeg')
    evit_jax.create_model('deit_s', class_names=names, keep_rate=1.0).save(tmp_path / 'weights' / 'deit_s-1-224')
    flags = f'--data={tmp_path / "in"}', f'--weights={tmp_path / "weights"}', f'--out={tmp_path / "out"}'
    run('--table=all', *flags)
    rows = json.loads((tmp_path / 'out' / 'paper.json').read_text())['rows']
    measured = [row for row in rows if row['measured']]
    assert {row['table'] for row in measured} == {'training_free', 'deit'} and len(measured) == 6 + 1
    head = 384 * (1000 - len(names))  # multiply-accumulates of the absent classes
    assert [(row['measured']['images'], row['measured']['macs']) for row in measured] == [
        (20, row['macs'] - head) for row in measured]
    (tmp_path / 'weights').rename(tmp_path / 'gone')
    assert run('--table=training_free', *flags).count('| 94.9 |') == 0  # read from the results of the first call
