"""Results are read from runs, evaluations and measurements, and speeds are joined with evaluations."""

import json

import pytest

from evit_jax import models
from evit_jax.benchmarks.results import read_results
from evit_jax.metrics import writers
from evit_jax.reduction.plan import make_plan
from evit_jax.viz.tradeoff import Result
from tests.helpers.evaluations import make_rows, make_run

CONFIG = models.get_config('vit_digits')
PLAN = make_plan(64, 6, rate=0.7, reduce_at=(0, 2, 4))


def test_read_results_of_a_run_and_rows_returns_both(tmp_path):
    workdir = make_run(tmp_path / 'run', **{'keep.rates': [0.9, 0.5], 'model.fuse': False})
    rows = make_rows(tmp_path / 'a.json', {'model': 'deit_s', 'rate': 0.5, 'top1': 78.5, 'macs': 5e9},
                     {'name': 'mine', 'top1': 80, 'images_per_second': 12.0})
    read = read_results([workdir, rows])
    assert read.results == [
        Result('vit, not fused', '0.9/0.5', 0.5, 1000, 7), Result('deit_s', '0.5', 0.785, 5e9, None, True),
        Result('mine', 'mine', 0.8, None, 12.0, True)] and not read.unmatched
    assert read_results([workdir / 'metrics.jsonl'], ema=True).results[0].top1 == 0.6


def test_speed_without_plan_joins_the_run_of_the_same_macs(tmp_path):
    measured = [{'model': 'vit', 'macs': macs, 'images_per_second': speed}
                for macs, speed in ((1000, 3), (1000, 5), (1000, 4), (999, 100))]
    measured += [{'macs': 1000, 'step': 'train', 'images_per_second': 50},
                 {'macs': 1000, 'engine': 'torch', 'images_per_second': 60}]
    read = read_results([make_rows(tmp_path / 'a.json', *measured), make_run(tmp_path / 'run')])
    assert [(result.label, result.speed) for result in read.results] == [('0.7', 5)] and len(read.unmatched) == 1


def known_run(folder, plan=PLAN, **config):
    """Writes a run of a named model, so that its plan can be computed."""
    return make_run(folder, macs=CONFIG.macs(plan), **{
        'model.name': 'vit_digits', 'model.image_size': 64, 'model.classes': 10, 'model.reduce_at': [0, 2, 4],
        'model.fuse': True} | config)


def speed_of(plan, speed=100, **changes):
    return {'model': 'vit_digits', 'image_size': 64, 'plan': str(plan), 'macs': CONFIG.macs(plan),
            'images_per_second': speed} | changes


def write_evaluation(folder, plan, top1, /, **changes):
    metrics = {'top1': top1, 'top1_ema': top1 / 2, 'macs': CONFIG.macs(plan), 'images_per_second': 3}
    (folder / f'evaluate-{sum(plan.counts)}.json').write_text(json.dumps({
        'metrics': metrics, 'plan': {'description': str(plan), 'tokens': [plan.keep[at] for at in plan.reductions]},
        'preprocessing': {'image_size': 64}} | changes))


def at_rate(rate, reduce_at=(0, 2, 4), **changes):
    return make_plan(64, 6, rate=rate, reduce_at=reduce_at, **changes)


def test_speed_with_plan_joins_the_evaluation_of_this_plan_only(tmp_path):
    other = speed_of(at_rate(0.7, (1, 3, 4)), 300, macs=CONFIG.macs(PLAN))  # another plan with the same MACs
    rows = make_rows(tmp_path / 'a.json', other, speed_of(PLAN, 50), speed_of(PLAN, 70),
                     speed_of(PLAN, 200, image_size=32), speed_of(PLAN, 200, model='lvvit_digits'),
                     speed_of(at_rate(0.7, fuse=False), 200))
    read = read_results([known_run(tmp_path / 'run'), rows])
    assert [(result.label, result.speed) for result in read.results] == [('0.7', 70)]
    assert len(read.unmatched) == 4
    assert str(at_rate(0.7, (1, 3, 4))) in read.explain() and f'evaluated: vit_digits, 64 px, {PLAN}' in read.explain()


def test_speed_of_a_rectangle_joins_the_evaluation_of_its_size_only(tmp_path):
    plan = make_plan(128, 6, rate=0.5, reduce_at=(0, 2, 4))
    workdir = known_run(tmp_path / 'run', **{'model.image_width': 128})
    write_evaluation(workdir, plan, 0.3, preprocessing={'image_size': [64, 128]})
    rows = make_rows(tmp_path / 'a.json', speed_of(plan, 50, image_size=[64, 128]),
                     speed_of(plan, 70, image_size=[128, 64]))
    read = read_results([workdir, rows])
    assert [(result.label, result.speed) for result in read.results if result.label == '0.5'] == [('0.5', 50)]
    assert f'vit_digits, 128x64 px, {plan}' in read.explain()


def test_workdir_with_evaluation_files_gives_a_curve(tmp_path):
    workdir = known_run(tmp_path / 'run')
    write_evaluation(workdir, PLAN, 0.4)  # the plan of training occurs once in the result
    write_evaluation(workdir, at_rate(1.0), 0.6)
    write_evaluation(workdir, at_rate(0.5), 0.3)
    write_evaluation(workdir, make_plan(64, 6, tokens=(60, 20), reduce_at=(1, 5)), 0.2)
    (workdir / 'evaluate-old.json').write_text('{"metrics": {}}')
    rows = make_rows(tmp_path / 'a.json', *(speed_of(at_rate(rate), 100 / rate) for rate in (1.0, 0.5)))
    read = read_results([workdir, rows])
    assert {(result.label, result.top1, result.speed) for result in read.results} == {
        ('0.7', 0.5, None), ('1', 0.6, 100), ('0.5', 0.3, 200), ('60-20', 0.2, None)}  # not the speeds of evaluations
    assert {result.series for result in read.results} == {'vit_digits'} and not read.unmatched
    assert {result.top1 for result in read_results([workdir], ema=True).results} == {0.6, 0.3, 0.15, 0.1}
    beside = read_results([workdir, known_run(tmp_path / 'b')]).results
    assert {result.series for result in beside} == {'vit_digits (run)', 'vit_digits (b)'}


def test_evaluation_of_other_weights_or_images_is_left_out_with_a_warning(tmp_path, caplog):
    workdir = known_run(tmp_path / 'run')
    write_evaluation(workdir, at_rate(0.5), 0.3, step=1)  # training ended at step 2
    write_evaluation(workdir, at_rate(1.0), 0.6, step=2)
    assert {result.label for result in read_results([workdir]).results} == {'0.7', '1'}
    assert 'step 1 there, 2 in the latest' in caplog.text and str(at_rate(0.5)) in caplog.text
    content = json.loads((workdir / f'evaluate-{64 * 6}.json').read_text())
    (workdir / writers.METRICS_FILE).unlink()
    for rate, images in ((1.0, 100), (0.5, 99)):
        write_evaluation(workdir, at_rate(rate), 0.5, metrics=content['metrics'] | {'images': images, 'left_out': 0})
    assert len(read_results([workdir]).results) == 1 and 'images' in caplog.text


def test_evaluation_given_twice_counts_once(tmp_path):
    workdir = known_run(tmp_path / 'run')
    write_evaluation(workdir, at_rate(0.5), 0.3, workdir=str(workdir), model={'name': 'vit_digits'})
    results = read_results([workdir, *workdir.glob('evaluate-*.json'), workdir]).results
    assert {(result.series, result.label) for result in results} == {('vit_digits', '0.7'), ('vit_digits', '0.5')}
    assert len(results) == 2


def test_evaluation_outside_its_workdir_is_read(tmp_path):
    workdir = known_run(tmp_path / 'run')
    write_evaluation(workdir, at_rate(0.5), 0.3, workdir=str(workdir), model={'name': 'vit_digits'})
    file, = workdir.glob('evaluate-*.json')
    (tmp_path / 'own.json').write_text(file.read_text())
    rows = make_rows(tmp_path / 'a.json', speed_of(at_rate(0.5), 200))
    assert [(result.label, result.top1, result.speed) for result in read_results(
        [tmp_path / 'own.json', rows]).results] == [('0.5', 0.3, 200)]
    (workdir / writers.METRICS_FILE).unlink()
    assert [result.label for result in read_results([workdir, rows]).results] == ['0.5']
    (tmp_path / 'own.json').write_text('{"metrics": {"top1": 3}}')
    with pytest.raises(ValueError, match=r'own.json holds no evaluation'):
        read_results([tmp_path / 'own.json'])


def test_speed_of_one_run_joins_this_run_only(tmp_path):
    one, other = known_run(tmp_path / 'one'), known_run(tmp_path / 'other')
    rows = make_rows(tmp_path / 'a.json', speed_of(PLAN, 50, run=str(other)))
    assert [result.speed for result in read_results([one, other, rows]).results] == [None, 50]
    assert [result.speed for result in read_results([one, rows]).results] == [50]  # the result of another folder


def test_speeds_without_any_evaluation_raise_and_list_both_sides(tmp_path):
    rows = make_rows(tmp_path / 'a.json', speed_of(at_rate(0.7, (1, 3, 4))))
    with pytest.raises(ValueError, match=r'none of the 1 speeds belongs to an evaluation: measured: vit_digits, 64 px, '
                                         r'64 > .* at blocks \(1, 3, 4\), fused; evaluated: vit_digits, 64 px, '
                                         r'64 > .* at blocks \(0, 2, 4\), fused'):
        read_results([known_run(tmp_path / 'run'), rows])


def test_evaluation_with_other_macs_than_its_config_has_no_plan(tmp_path):
    workdir = known_run(tmp_path / 'run', at_rate(0.5))
    with pytest.raises(ValueError, match='plan unknown'):
        read_results([workdir, make_rows(tmp_path / 'a.json', speed_of(PLAN))])


@pytest.mark.parametrize('content, message', [
    ({'measurement': 'input', 'rows': [{'name': 'decode'}]}, 'holds the measurement of input, .* model --json'),
    ({'model': 'vit_digits', 'tokens': [9]}, 'is no JSON with "rows"'), ([1], 'is no JSON with "rows"')])
def test_json_of_another_kind_raises(tmp_path, content, message):
    (tmp_path / 'a.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_results([tmp_path / 'a.json'])


def test_top1_above_one_makes_the_file_percent(tmp_path, caplog):
    def top1_of(*values):
        rows = [{'name': str(at), 'top1': value, 'macs': 1} for at, value in enumerate(values)]
        return [result.top1 for result in read_results([make_rows(tmp_path / 'a.json', *rows)]).results]

    assert top1_of(0.795, 1) == [0.795, 1] and top1_of(0, 100) == [0, 1] and not caplog.text
    assert top1_of(79.5, 0.9) == pytest.approx([0.795, 0.009])
    assert 'a.json: top1 is in percent, as 79.5 is above 1, so 0.9 is read as 0.9 %' in caplog.text


@pytest.mark.parametrize(('row', 'message'), [
    ({'top1': 798}, 'top1 798 is above 100 %'), ({'rate': '0.7'}, "rate '0.7' is not a number"),
    ({'image_size': [64]}, r'image_size \[64\] is neither'), ({'macs': 'x'}, "'x' is neither")])
def test_row_of_a_wrong_type_or_range_is_refused_with_its_file(tmp_path, row, message):
    with pytest.raises(ValueError, match=f'a.json: {message}'):
        read_results([make_rows(tmp_path / 'a.json', {'name': 'a', 'images_per_second': 5} | row)])


def test_speed_of_null_is_joined_with_no_evaluation(tmp_path):
    rows = make_rows(tmp_path / 'a.json', speed_of(PLAN, None))
    assert [result.speed for result in read_results([known_run(tmp_path / 'run'), rows]).results] == [7]


@pytest.mark.parametrize('changes', [
    {'plan': {'tokens': 3}}, {'preprocessing': {'image_size': [64]}}, {'preprocessing': {'mean': [[1]]}}, {'step': '2'},
    {'data': 5}, {'metrics': {'top1': 0.5, 'macs': 10, 'images': '7'}}], ids=str)
def test_evaluation_file_with_a_wrong_type_is_left_out_with_a_warning(tmp_path, caplog, changes):
    workdir = known_run(tmp_path / 'run')
    write_evaluation(workdir, at_rate(0.5), 0.3, **changes)
    assert [result.label for result in read_results([workdir]).results] == ['0.7']
    assert 'json is left out: it holds no evaluation' in caplog.text
    file, = workdir.glob('evaluate-*.json')
    file.write_text(json.dumps(json.loads(file.read_text()) | {'workdir': 5}))
    with pytest.raises(ValueError, match=r'json: "workdir": 5 is no path'):
        read_results([file])

OTHERWISE = {'data': {'source': 'folder', 'name': '', 'split': 'val'},
             'preprocessing': {'image_size': 64, 'mean': [0.5] * 3, 'std': [0.2] * 3, 'eval_crop': 0.9}}


@pytest.mark.parametrize('group, key, value', [
    ('data', 'split', 'test'), ('data', 'source', 'digits'), ('preprocessing', 'mean', [0.4] * 3),
    ('preprocessing', 'std', [0.3] * 3), ('preprocessing', 'eval_crop', 1.0)])
def test_evaluation_of_other_data_or_preprocessing_is_left_out_with_a_warning(tmp_path, caplog, group, key, value):
    workdir = known_run(tmp_path / 'run', **{
        'data.source': 'folder', 'data.name': 'imagenet2012', 'data.test_split': 'auto', 'data.eval_crop': 0.9,
        'data.mean': [0.5] * 3, 'data.std': [0.2] * 3, 'recorded': {'test': {'split': 'val'}}})
    write_evaluation(workdir, at_rate(0.5), 0.3, **OTHERWISE)
    write_evaluation(workdir, at_rate(1.0), 0.6, **OTHERWISE | {group: OTHERWISE[group] | {key: value}})
    assert {result.label for result in read_results([workdir]).results} == {'0.7', '0.5'}
    assert f'): {key} ' in caplog.text and caplog.text.count(' there, ') == 1
