"""Runs as models to measure and to plan: found, combined with flags, measured, planned."""

import dataclasses
import json
import logging
import re
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from evit_jax import cli, models
from evit_jax.benchmarks import cases, model, subjects
from evit_jax.benchmarks.measured import find_model
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import load_model
from evit_jax.planning import costs
from evit_jax.planning.costs import Asked
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.reducers import TOME
from tests.helpers import doors, layouts
from tests.planning.test_costs import table

least, plan, benchmark = layouts.least, doors.imported('plan'), doors.imported('benchmark')
ASKED = {'rates': [1.0, 0.5], 'batches': [2]}


def make_run(folder, seed=0, predictors=0, **changes):
    config = layouts.config_of(**{'model__reduce_at': (1, 0), 'keep__rate': 0.75} | changes).to_dict()
    shape = dataclasses.replace(layouts.SHAPE, classes=3, predictors=predictors)
    weights.save(folder, models.create(shape).init(jax.random.key(seed)),
                 {'config': config, 'class_names': ['red', 'green', 'blue']})
    return str(folder)


def said(found):
    return [re.sub(r'^\S+/', '', str(case)) for case in found]


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        yield caplog


def test_run_is_measured_with_its_own_blocks_fusion_reducer_size_dtype_and_plan(tmp_path):
    run = make_run(tmp_path / 'a', model__fuse=False, model__dtype='bfloat16')
    assert said(cases.combine(names=[run], **ASKED)) == [
        f'a {how}, 16 px, batch 2, bfloat16' for how in ('dense', '0.5 not fused', '0.75 not fused')]
    own = cases.combine(names=[run], **ASKED)[-1]
    assert own.plan == load_model(run).plan() and own.reduce_at == (0, 1) and own.config.classes == 3
    tome = make_run(tmp_path / 'b', reducer__name='tome', reducer__r=3)
    found = cases.combine(names=[tome], **ASKED)
    assert said(found)[1:] == ['b 0.5 merged, tome, 16 px, batch 2, float32',
                               'b r=3 merged, tome, 16 px, batch 2, float32']
    assert found[-1].plan == load_model(tome).plan()


@pytest.mark.parametrize('changes', [
    {'keep__rates': (0.5, 0.9)}, {'keep__tokens': (4, 12)}, {'keep__macs': 0.7},
    {'reducer__name': 'tome', 'reducer__r': 3, 'reducer__decreasing': True},
    {'reducer__name': 'pool', 'keep__macs': 0.8},
    {'reducer__name': 'random', 'model__fuse': False, 'keep__tokens': (4, 12)}], ids=str)
def test_own_plan_of_a_run_is_the_trained_one_whatever_way_it_is_given(tmp_path, changes):
    run = make_run(tmp_path / 'a', **changes)
    assert cases.combine(names=[run], rates=[1.0], batches=[1])[-1].plan == load_model(run).plan()


def test_flags_win_over_what_the_run_has_and_its_own_plan_stays_at_its_own_size(tmp_path):
    run = make_run(tmp_path / 'a')
    found = cases.combine(names=[run, 'vit_layouts'], **ASKED, sizes=[32], reduce_at=(1,), methods=['random'],
                          fuse=[False], dtypes=['bfloat16'])
    assert said(found) == [f'{name} {how}, 32 px, batch 2, bfloat16' for name in ('a', 'vit_layouts')
                           for how in ('dense', '0.5 not fused, random')]
    assert {case.reduce_at for case in found} == {(), (1,)}


def test_row_names_the_run_and_its_plan_and_weights_are_the_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(subjects, '_SQUARES', {'cpu': 64})
    run = make_run(tmp_path / 'a', seed=5)
    own = cases.combine(names=[run], rates=[1.0], batches=[2])[-1]
    row, = model.measure([own], rounds=2, seconds=0.02)['rows']
    assert (row['run'], row['model'], row['plan'], row['rate']) == (run, 'vit_layouts', str(own.plan), 0.75)
    assert row['reduce_at'] == [0, 1] and row['tokens'] == [12, 10] and row['image_size'] == 16
    stock = subjects.ModelCache()
    want = load_model(run).params
    jax.tree.map(np.testing.assert_array_equal, stock.params(own.shape, run), want)
    larger = stock.params(dataclasses.replace(own.shape, image_size=32), run)
    assert larger['pos_embed'].shape[1] > want['pos_embed'].shape[1]  # other weights are as fast


def test_plan_file_is_measured_with_each_run_of_its_model(tmp_path):
    runs = [make_run(tmp_path / name) for name in 'ab']
    planned = costs.PlanFile.of(make_plan(16, 2, tokens=(9, 5), reduce_at=(0, 1)), 'vit_layouts', 16)
    found = cases.combine(names=['deit_t', *runs], rates=[1.0], batches=[1], planned=[planned])
    assert [(case.run, case.tokens) for case in found if case.tokens] == [(run, (9, 5)) for run in runs]
    with pytest.raises(ValueError, match=r'is for vit_layouts .*, and this is deit_t'):
        cases.combine(names=['deit_t'], rates=[1.0], batches=[1], planned=[planned])


def test_name_that_is_also_a_folder_is_the_model_and_the_warning_names_the_other_way(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / 'vit_layouts')
    assert find_model('--models', 'vit_layouts').run == ''
    assert '--models=vit_layouts is the named model; for the run in the folder' in log.text
    assert 'give --models=./vit_layouts' in log.text
    assert find_model('--models', './vit_layouts').run == './vit_layouts'


@pytest.mark.parametrize('word, message', [
    ('vit_layout', "unknown model 'vit_layout': did you mean vit_layouts"), ('', "unknown model ''"),
    ('HERE/none', 'there is no folder .*none'), ('HERE', 'holds no checkpoint'), ('HERE/file', 'file')])
def test_word_that_is_no_model_and_no_run_is_refused(tmp_path, word, message):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(ValueError, match=message):
        find_model('--model', word.replace('HERE', str(tmp_path)))


def test_rates_of_a_run_without_blocks_are_refused(tmp_path):
    run = make_run(tmp_path / 'a', model__reduce_at=())
    with pytest.raises(ValueError, match=r'drops tokens at no block .* --rates=1,0.5 would all be dense: give '
                                         r'--reduce_at'):
        cases.combine(names=[run], **ASKED)
    assert len(cases.combine(names=[run], rates=[1.0], batches=[1])) == 1
    assert len(cases.combine(names=[run], **ASKED, reduce_at=[1])) == 2


def test_training_step_of_a_run_has_its_model(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, '_config', lambda example: layouts.config_of())
    run = make_run(tmp_path / 'a', keep__tokens=(4, 12))
    case = cases.combine(names=[run], rates=[1.0], batches=[2], train=True)[-1]
    config = benchmark._config_of(case)
    laid = benchmark.experiment.setup(config, mesh=benchmark.sharding.data_mesh(2, jax.devices()[:1]),
                                  sources=benchmark._generated(config))
    assert case.train and laid.plan == case.plan and laid.model.config == case.config


@pytest.fixture
def program(plan, monkeypatch, capsys):
    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['plan', *map(str, words)])
        monkeypatch.setattr(cli, 'configure_logging', lambda: None)
        with flagsaver.flagsaver():
            try:
                cli.run(plan.main)
                code = 0
            except SystemExit as error:
                code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_plan_for_a_run_uses_its_blocks_and_is_taken_by_it(program, tmp_path):
    run, kept, out = make_run(tmp_path / 'a', model__reduce_at=(0,), model__fuse=False), tmp_path / 'c', tmp_path / 'p'
    found = find_model('--model', run)
    costs.find(Asked('vit_layouts', 16, 2, 'float32', 'this', False, found), lambda asked: table(), kept)
    code, printed, err = program(f'--model={run}', '--target=1.04x', '--batch=2', f'--costs={kept}', '--nomeasure',
                                 f'--out={out}')
    assert code == 0, err
    planned = read_plan_file(out)
    assert planned.reduce_at == (0,) and not planned.fuse and json.loads(out.read_text())['run'] == run
    assert printed.startswith(f'{run} (vit_layouts), 16 px, batch 2, float32')
    assert load_model(run).plan(plan=planned).reductions == (0,)


def test_plan_is_measured_with_the_reducer_of_the_run(tmp_path):
    found = find_model('--model', make_run(tmp_path / 'a', reducer__name='tome', reducer__r=3))
    asked = Asked('vit_layouts', 16, 2, 'float32', 'this', False, found)
    case = costs.case_of(asked, make_plan(16, 2, tokens=(9,), reduce_at=(1,), fuse=False))
    assert case.reducer == TOME and case.plan.counts == (16, 9) and case.run == found.run


@pytest.mark.parametrize('changes, words, message', [
    ({'reducer__name': 'dynamicvit', 'predictors': 2}, (), 'whose predictors were trained at the blocks .0, 1.'),
    ({'reducer__name': 'tome', 'reducer__r': 3}, ('--least_rate=0.4',), 'keeps at least half of the tokens')])
def test_plan_refuses_what_the_reducer_of_the_run_cannot_do(program, tmp_path, changes, words, message):
    code, _, err = program(f'--model={make_run(tmp_path / "a", **changes)}', '--target=1.1x', '--nomeasure', *words)
    assert code == 2 and re.search(message, err), err
