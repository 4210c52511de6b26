"""A searched plan with drops, from its file through training, evaluation, export, benchmark and saved models."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

import evit_jax
from evit_jax.benchmarks import model_speed
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.model_digest import digest_of_architecture, digest_of_weights
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.reduction.registry import get_reducer
from evit_jax.serving import loader
from evit_jax.training import evaluation_files, loop
from tests.helpers import exports, layouts, program_modules, programs, tiny
from tests.helpers.benchmarks import combine_lists

least, checkpoint, export, run_export = layouts.least, exports.checkpoint, exports.export, exports.run
predict = program_modules.module_fixture('predict')
PLAN = make_plan(16, 2, tokens=(12, 8), drop=(2, 1), reduce_at=(0, 1), reducer=get_reducer('prune_merge:mean'))
SHORT = {'epochs': 1, 'checkpoint__every': 1, 'log__pictures': 0}


def write(path, config, params):
    plan_file = PlanFile.of(PLAN, 'vit_layouts', 16, reducer='prune_merge:mean', weights=digest_of_weights(params),
                            architecture=digest_of_architecture(config))
    path.write_text(json.dumps(plan_file.metadata() | {'figures': {}, 'date': 'today'}))
    return path


@pytest.fixture(scope='module')
def plan_file(checkpoint, tmp_path_factory):
    loaded = load_model(checkpoint)
    return write(tmp_path_factory.mktemp('plans') / 'fast.json', loaded.config, loaded.params)


def train(workdir, plan_file, **changes):
    config = layouts.config_of(**SHORT | changes)
    return loop.train(config, workdir, sources=layouts.sources(), model_config=layouts.model_of(config),
                      plan_file=read_plan_file(plan_file))


@pytest.fixture(scope='module')
def trained(checkpoint, plan_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    return workdir, train(workdir, plan_file, init_from=str(checkpoint))


def test_train_with_a_searched_plan_resumes_and_loads_with_the_plan(trained, plan_file, checkpoint):
    workdir, metrics = trained
    config = workdirs.saved_config(workdir)
    assert (config['keep.drop'], config['reducer.name']) == ([2, 1], 'prune_merge:mean')
    assert train(workdir, plan_file, init_from=str(checkpoint))['top1'] == metrics['top1']  # the run is complete
    assert load_model(workdir).plan() == PLAN and evit_jax.load(workdir).plan == PLAN


def test_evaluate_with_a_searched_plan_writes_its_name_and_warns_of_other_weights(trained, plan_file, tmp_path, caplog):
    workdir, metrics = trained
    for number, plan in enumerate((None, read_plan_file(plan_file))):
        result = loop.evaluate_workdir(layouts.config_of(), workdir, explicit=(), from_file=False, plan_file=plan,
                                       source=layouts.Colours('test'), out=tmp_path / str(number))
        assert result['top1'] == metrics['top1'] and result['macs'] == metrics['macs']
        name = evaluation_files.plan_name(PLAN)
        assert name == 'prune_merge-mean-16-each-12-8-drop-2-1'
        written = json.loads((tmp_path / str(number) / f'evaluate-{name}.json').read_text())
        assert written['plan']['drop'] == [2, 1]
        assert caplog.text.count('was searched for other weights') == number


def test_predict_with_a_searched_plan_equals_the_plan_of_the_api(predict, checkpoint, plan_file, tmp_path, capsys):
    Image.fromarray(tiny.images(1)[0]).save(tmp_path / 'a.png')
    code, errors = programs.run(predict, ('CHECKPOINT', 'IMAGES...'), checkpoint, tmp_path / 'a.png', '--json',
                                f'--plan={plan_file}')
    assert code == 0, errors
    printed = json.loads(capsys.readouterr().out)
    expected, = evit_jax.load(checkpoint).with_plan(plan=PLAN).predict(tmp_path / 'a.png')
    assert printed['token_of_patch'] == [index.tolist() for index in expected.token_of_patch]
    assert [min(index) for index in printed['token_of_patch']] == [-1, -1]
    code, errors = programs.run(predict, ('CHECKPOINT', 'IMAGES...'), checkpoint, tmp_path / 'a.png',
                                f'--plan={plan_file}', '--reducer=tome')
    assert code == 2 and 'is for the reducer prune_merge:mean, and tome is given' in errors


def test_predict_with_r_for_each_block_merges_these_numbers(predict, checkpoint, tmp_path, capsys):
    Image.fromarray(tiny.images(1)[0]).save(tmp_path / 'a.png')
    words = (checkpoint, tmp_path / 'a.png', '--json', '--reducer=tome')
    code, errors = programs.run(predict, ('CHECKPOINT', 'IMAGES...'), *words, '--r=5-2')
    assert code == 0, errors
    assert [len(kept) for kept in json.loads(capsys.readouterr().out)['kept']] == [11, 9]
    for r, message in (('5-2-1', 'has 3 numbers for 2 blocks'), ('5-x', 'is no list of whole numbers')):
        code, errors = programs.run(predict, ('CHECKPOINT', 'IMAGES...'), *words, f'--r={r}')
        assert code == 2 and message in errors


def test_export_with_a_searched_plan_serves_its_probabilities(run_export, checkpoint, plan_file, tmp_path):
    code, errors = run_export(checkpoint, tmp_path / 'out', f'--plan={plan_file}', '--platforms=cpu')
    assert code == 0, errors
    entry = json.loads((tmp_path / 'out' / 'manifest.json').read_text())['plans']['fast']
    assert (entry['reducer'], entry['tokens'], entry['drop']) == ('prune_merge:mean', [12, 8], [2, 1])
    model, images = evit_jax.load(checkpoint).with_plan(plan=plan_file), tiny.images(2)
    served = loader.Served(tmp_path / 'out')(images, 'fast')['probabilities']
    logits = np.asarray(model(images))
    np.testing.assert_allclose(served, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-5)


def test_export_with_r_for_each_block_names_the_plans(run_export, checkpoint, tmp_path):
    code, errors = run_export(checkpoint, tmp_path / 'out', '--reducer=tome', '--r=2,5-2', '--platforms=cpu')
    assert code == 0, errors
    plans = json.loads((tmp_path / 'out' / 'manifest.json').read_text())['plans']
    assert {name: plan['tokens'] for name, plan in plans.items()} == {'r2': [14, 12], 'r5-2': [11, 9]}


def test_benchmark_of_a_searched_plan_and_of_a_run_reports_the_drops(trained, plan_file):
    lists = {'rates': [1.0], 'fuse': [True], 'batch_sizes': [1], 'dtypes': ['float32']}
    for names, plans in ((['vit_layouts'], [read_plan_file(plan_file)]), ([str(trained[0])], [])):
        workloads = combine_lists(names=names, plans=plans, **lists)
        assert [workload.plan for workload in workloads if workload.plan.reductions] == [PLAN]
    row = model_speed.measure(workloads, rounds=2, seconds=0.01)['rows'][-1]
    assert (row['tokens'], row['drop'], row['reducer']) == ([12, 8], [2, 1], 'prune_merge:mean')


@pytest.mark.parametrize('save', ['save', 'save_pretrained'])
def test_saved_model_with_a_searched_plan_loads_with_the_plan(save, tmp_path, caplog):
    model = tiny.model()
    model = model.with_plan(plan=write(tmp_path / 'fast.json', model.config, model.params))
    getattr(model, save)(tmp_path / 'saved')
    loaded, images = evit_jax.load(tmp_path / 'saved'), tiny.images(2)
    assert loaded.plan == PLAN
    np.testing.assert_allclose(loaded(images), model(images), atol=1e-5)
    with caplog.at_level(logging.WARNING):
        assert loaded.with_plan(plan=tmp_path / 'fast.json').plan == PLAN
    assert 'other weights' not in caplog.text
