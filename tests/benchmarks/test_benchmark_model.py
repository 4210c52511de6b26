"""Models to benchmark: selected by name or folder, and combined with the flags into workloads."""

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest

import evit_jax
from evit_jax.benchmarks import cases, model_speed
from evit_jax.benchmarks.benchmark_model import find_model
from evit_jax.checkpoints.loaded import load_model
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from tests.helpers import layouts, program_modules
from tests.helpers.benchmarks import combine_lists
from tests.helpers.weights import save_random_run

least, benchmark = layouts.least, program_modules.module_fixture('benchmark')
LISTS = {'rates': [1.0, 0.5], 'batch_sizes': [2]}


def short_names(result):
    return [re.sub(r'^\S+/', '', str(case)) for case in result]


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, 'absl'):
        yield caplog


def test_combine_run_uses_its_own_settings_and_plan(tmp_path):
    run = save_random_run(tmp_path / 'a', model__fuse=False, model__dtype='bfloat16')
    assert short_names(combine_lists(names=[run], **LISTS)) == [
        f'a {how}, 16 px, batch 2, bfloat16' for how in ('dense', '0.5 not fused', '0.75 not fused')]
    own = combine_lists(names=[run], **LISTS)[-1]
    assert own.plan == load_model(run).plan() and own.reduce_at == (0, 1) and own.config.classes == 3
    tome = save_random_run(tmp_path / 'b', reducer__name='tome', reducer__r=3)
    result = combine_lists(names=[tome], **LISTS)
    assert short_names(result)[1:] == ['b 0.5 merged, tome, 16 px, batch 2, float32',
                               'b r=3 merged, tome, 16 px, batch 2, float32']
    assert result[-1].plan == load_model(tome).plan()


@pytest.mark.parametrize('changes', [
    {'keep__rates': (0.5, 0.9)}, {'keep__tokens': (4, 12)}, {'keep__macs': 0.7},
    {'reducer__name': 'tome', 'reducer__r': 3, 'reducer__decreasing': True},
    {'reducer__name': 'pool', 'keep__macs': 0.8},
    {'reducer__name': 'random', 'model__fuse': False, 'keep__tokens': (4, 12)}], ids=str)
def test_combine_run_has_the_plan_it_was_trained_with(tmp_path, changes):
    run = save_random_run(tmp_path / 'a', **changes)
    assert combine_lists(names=[run], rates=[1.0], batch_sizes=[1])[-1].plan == load_model(run).plan()


def test_combine_flags_override_the_settings_of_a_run(tmp_path):
    run = save_random_run(tmp_path / 'a')
    result = combine_lists(names=[run, 'vit_layouts'], **LISTS, image_sizes=[32], reduce_at=(1,), reducers=['random'],
                          fuse=[False], dtypes=['bfloat16'])
    assert short_names(result) == [f'{name} {how}, 32 px, batch 2, bfloat16' for name in ('a', 'vit_layouts')
                           for how in ('dense', '0.5 not fused, random')]
    assert {case.reduce_at for case in result} == {(), (1,)}


def test_measure_run_uses_its_weights_and_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, '_MATMUL_SIZES', {'cpu': 64})
    run = save_random_run(tmp_path / 'a', seed=5)
    own = combine_lists(names=[run], rates=[1.0], batch_sizes=[2])[-1]
    row, = model_speed.measure([own], rounds=2, seconds=0.02)['rows']
    assert (row['run'], row['model'], row['plan'], row['rate']) == (run, 'vit_layouts', str(own.plan), 0.75)
    assert row['reduce_at'] == [0, 1] and row['tokens'] == [12, 10] and row['image_size'] == 16
    cache = cases.ModelCache()
    want = load_model(run).params
    jax.tree.map(np.testing.assert_array_equal, cache.params(own.config, run), want)
    larger = cache.params(dataclasses.replace(own.config, image_size=32), run)
    assert larger['pos_embed'].shape[1] > want['pos_embed'].shape[1]  # random weights


def test_measure_rectangles_names_height_and_width(monkeypatch):
    monkeypatch.setattr(cases, '_MATMUL_SIZES', {'cpu': 64})
    own = combine_lists(names=['vit_layouts'], rates=[1.0], batch_sizes=[2], image_sizes=[(16, 32)])[-1]
    row, = model_speed.measure([own], rounds=2, seconds=0.02)['rows']
    assert row['image_size'] == (16, 32) and '16x32 px' in row['case']


def test_combine_plan_file_applies_to_each_run_of_its_model(tmp_path):
    runs = [save_random_run(tmp_path / name) for name in 'ab']
    planned = PlanFile.of(make_plan(16, 2, tokens=(9, 5), reduce_at=(0, 1)), 'vit_layouts', 16)
    result = combine_lists(names=['deit_t', *runs], rates=[1.0], batch_sizes=[1], plans=[planned])
    assert [(case.run, case.tokens) for case in result if case.tokens] == [(run, (9, 5)) for run in runs]
    with pytest.raises(ValueError, match=r'is for vit_layouts .*, and this is deit_t'):
        combine_lists(names=['deit_t'], rates=[1.0], batch_sizes=[1], plans=[planned])


def test_find_model_name_that_is_also_a_folder_is_the_named_model(tmp_path, monkeypatch, log):
    monkeypatch.chdir(tmp_path)
    save_random_run(tmp_path / 'vit_layouts')
    assert find_model('--models', 'vit_layouts').run == ''
    assert '--models=vit_layouts is the named model; for the run in the folder' in log.text
    assert 'give --models=./vit_layouts' in log.text
    assert find_model('--models', './vit_layouts').run == './vit_layouts'


@pytest.mark.parametrize('word, message', [
    ('vit_layout', "unknown model 'vit_layout': did you mean vit_layouts"), ('', "unknown model ''"),
    ('HERE/none', 'there is no file or folder .*none'), ('HERE', 'holds no checkpoint'),
    ('HERE/file', 'file is neither')])
def test_find_model_unknown_word_raises(tmp_path, word, message):
    (tmp_path / 'file').write_text('text')
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_model('--model', word.replace('HERE', str(tmp_path)))


def test_combine_rates_of_a_run_without_blocks_raises(tmp_path):
    run = save_random_run(tmp_path / 'a', model__reduce_at=())
    with pytest.raises(ValueError, match=r'drops tokens at no block .* --rates=1,0.5 would all be dense: give '
                                         r'--reduce_at'):
        combine_lists(names=[run], **LISTS)
    assert len(combine_lists(names=[run], rates=[1.0], batch_sizes=[1])) == 1
    assert len(combine_lists(names=[run], **LISTS, reduce_at=[1])) == 2


def test_training_config_of_a_run_has_its_model(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, '_config', lambda example: layouts.config_of())
    run = save_random_run(tmp_path / 'a', keep__tokens=(4, 12))
    case = combine_lists(names=[run], rates=[1.0], batch_sizes=[2], train=True)[-1]
    config = benchmark._training_config(case)
    setup = benchmark.experiment.setup(config, mesh=benchmark.sharding.data_mesh(2, jax.devices()[:1]),
                                  sources=benchmark._unread_sources(config))
    assert case.train and setup.plan == case.plan and setup.model.config == case.config
    config = benchmark._training_config(case._replace(image_size=(16, 32), tokens=()))
    assert (config.model.image_size, config.model.image_width) == (16, 32)


def test_training_config_of_a_model_without_a_name_has_its_config(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, '_config', lambda example: layouts.config_of(data__eval_crop=-1.0))
    model = evit_jax.create_model(dataclasses.replace(layouts.SHAPE, width=24), keep_rate=0.5)
    model.save(tmp_path / 'a')
    case = combine_lists(names=[str(tmp_path / 'a')], rates=[1.0], batch_sizes=[2], train=True)[-1]
    config = benchmark._training_config(case)
    setup = benchmark.experiment.setup(config, mesh=benchmark.sharding.data_mesh(2, jax.devices()[:1]),
                                       sources=benchmark._unread_sources(config), model_config=case.run_config)
    assert config.model.name == 'custom' and setup.model.config == model.config
