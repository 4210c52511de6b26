"""Accuracy against cost: what is read of runs and measurements, and the plot of it."""

import json

import pytest
from PIL import Image

from evit_jax import models
from evit_jax.benchmarks.results import read_results
from evit_jax.metrics import writers
from evit_jax.reduction.plan import make_plan
from evit_jax.viz import tradeoff
from evit_jax.viz.published import PUBLISHED
from evit_jax.viz.result import Result

SHAPE = models.get_config('vit_digits')
PLAN = make_plan(64, 6, rate=0.7, reduce_at=(0, 2, 4))


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
                     {'name': 'mine', 'top1': 80, 'images_per_second': 12.0})
    read = read_results([run_of, rows])
    assert read.results == [
        Result('vit, not fused', '0.9/0.5', 0.5, 1000, 7), Result('deit_s', '0.5', 0.785, 5e9, None, True),
        Result('mine', 'mine', 0.8, None, 12.0, True)] and not read.unmatched
    assert read_results([run_of / 'metrics.jsonl'], ema=True).results[0].top1 == 0.6


def test_a_speed_without_a_plan_goes_to_the_run_of_the_same_macs(tmp_path):
    measured = [{'model': 'vit', 'macs': macs, 'images_per_second': speed}
                for macs, speed in ((1000, 3), (1000, 5), (1000, 4), (999, 100))]
    measured += [{'macs': 1000, 'step': 'train', 'images_per_second': 50},
                 {'macs': 1000, 'engine': 'torch', 'images_per_second': 60}]
    read = read_results([make_rows(tmp_path / 'a.json', *measured), make_run(tmp_path / 'run')])
    assert [(result.label, result.speed) for result in read.results] == [('0.7', 5)] and len(read.unmatched) == 1


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
    config = models.get_config('deit_s')
    for result in PUBLISHED:
        if result.series == 'EViT-DeiT-S':
            rate = float(result.label) if result.label != 'DeiT-S' else 1.0
            assert config.macs(make_plan(196, 12, rate=rate)) == pytest.approx(result.macs, rel=0.02)


def known_run(folder, plan=PLAN, **config):
    """A run of a model that is known, so that its plan is."""
    return make_run(folder, macs=SHAPE.macs(plan), **{
        'model.name': 'vit_digits', 'model.image_size': 64, 'model.classes': 10, 'model.reduce_at': [0, 2, 4],
        'model.fuse': True} | config)


def speed_of(plan, speed=100, **changes):
    return {'model': 'vit_digits', 'image_size': 64, 'plan': str(plan), 'macs': SHAPE.macs(plan),
            'images_per_second': speed} | changes


def write_evaluation(folder, plan, top1, /, **changes):
    metrics = {'top1': top1, 'top1_ema': top1 / 2, 'macs': SHAPE.macs(plan), 'images_per_second': 3}
    (folder / f'evaluate-{sum(plan.counts)}.json').write_text(json.dumps({
        'metrics': metrics, 'plan': {'description': str(plan), 'tokens': [plan.keep[at] for at in plan.reductions]},
        'preprocessing': {'image_size': 64}} | changes))


def at_rate(rate, reduce_at=(0, 2, 4), **changes):
    return make_plan(64, 6, rate=rate, reduce_at=reduce_at, **changes)


def test_measured_speed_goes_to_the_evaluation_of_its_plan_and_not_by_macs(tmp_path):
    other = speed_of(at_rate(0.7, (1, 3, 4)), 300, macs=SHAPE.macs(PLAN))  # the same MACs by chance
    rows = make_rows(tmp_path / 'a.json', other, speed_of(PLAN, 50), speed_of(PLAN, 70),
                     speed_of(PLAN, 200, image_size=32), speed_of(PLAN, 200, model='lvvit_digits'),
                     speed_of(at_rate(0.7, fuse=False), 200))
    read = read_results([known_run(tmp_path / 'run'), rows])
    assert [(result.label, result.speed) for result in read.results] == [('0.7', 70)]
    assert len(read.unmatched) == 4
    assert str(at_rate(0.7, (1, 3, 4))) in read.explain() and f'evaluated: vit_digits, 64 px, {PLAN}' in read.explain()


def test_run_has_a_curve_from_the_files_of_its_evaluations(tmp_path):
    run_of = known_run(tmp_path / 'run')
    write_evaluation(run_of, PLAN, 0.4)  # the plan of training counts once
    write_evaluation(run_of, at_rate(1.0), 0.6)
    write_evaluation(run_of, at_rate(0.5), 0.3)
    write_evaluation(run_of, make_plan(64, 6, tokens=(60, 20), reduce_at=(1, 5)), 0.2)
    (run_of / 'evaluate-old.json').write_text('{"metrics": {}}')
    rows = make_rows(tmp_path / 'a.json', *(speed_of(at_rate(rate), 100 / rate) for rate in (1.0, 0.5)))
    found = read_results([run_of, rows])
    assert {(result.label, result.top1, result.speed) for result in found.results} == {
        ('0.7', 0.5, None), ('1', 0.6, 100), ('0.5', 0.3, 200), ('60-20', 0.2, None)}  # these include reading images
    assert {result.series for result in found.results} == {'vit_digits'} and not found.unmatched
    assert {result.top1 for result in read_results([run_of], ema=True).results} == {0.6, 0.3, 0.15, 0.1}
    beside = read_results([run_of, known_run(tmp_path / 'b')]).results
    assert {result.series for result in beside} == {'vit_digits (run)', 'vit_digits (b)'}


def test_evaluations_of_earlier_weights_or_other_images_are_left_out_with_a_warning(tmp_path, caplog):
    run_of = known_run(tmp_path / 'run')
    write_evaluation(run_of, at_rate(0.5), 0.3, step=1)  # training ended at step 2
    write_evaluation(run_of, at_rate(1.0), 0.6, step=2)
    assert {result.label for result in read_results([run_of]).results} == {'0.7', '1'}
    assert 'step 1 there, 2 in the latest' in caplog.text and str(at_rate(0.5)) in caplog.text
    told = json.loads((run_of / f'evaluate-{64 * 6}.json').read_text())
    (run_of / writers.METRICS_FILE).unlink()
    for rate, images in ((1.0, 100), (0.5, 99)):
        write_evaluation(run_of, at_rate(rate), 0.5, metrics=told['metrics'] | {'images': images, 'left_out': 0})
    assert len(read_results([run_of]).results) == 1 and 'images' in caplog.text


def test_evaluation_that_is_given_twice_counts_once(tmp_path):
    run_of = known_run(tmp_path / 'run')
    write_evaluation(run_of, at_rate(0.5), 0.3, workdir=str(run_of), model={'name': 'vit_digits'})
    results = read_results([run_of, *run_of.glob('evaluate-*.json'), run_of]).results
    assert {(result.series, result.label) for result in results} == {('vit_digits', '0.7'), ('vit_digits', '0.5')}
    assert len(results) == 2


def test_evaluation_elsewhere_and_a_folder_of_weights_alone_have_results(tmp_path):
    run_of = known_run(tmp_path / 'run')
    write_evaluation(run_of, at_rate(0.5), 0.3, workdir=str(run_of), model={'name': 'vit_digits'})
    file, = run_of.glob('evaluate-*.json')
    (tmp_path / 'own.json').write_text(file.read_text())
    rows = make_rows(tmp_path / 'a.json', speed_of(at_rate(0.5), 200))
    assert [(result.label, result.top1, result.speed) for result in read_results(
        [tmp_path / 'own.json', rows]).results] == [('0.5', 0.3, 200)]
    (run_of / writers.METRICS_FILE).unlink()
    assert [result.label for result in read_results([run_of, rows]).results] == ['0.5']
    (tmp_path / 'own.json').write_text('{"metrics": {"top1": 3}}')
    with pytest.raises(ValueError, match=r'own.json holds no evaluation'):
        read_results([tmp_path / 'own.json'])


def test_speed_of_one_run_stays_with_it(tmp_path):
    one, other = known_run(tmp_path / 'one'), known_run(tmp_path / 'other')
    rows = make_rows(tmp_path / 'a.json', speed_of(PLAN, 50, run=str(other)))
    assert [result.speed for result in read_results([one, other, rows]).results] == [None, 50]
    assert [result.speed for result in read_results([one, rows]).results] == [50]  # a copy, or the folder was renamed


def test_speeds_that_belong_to_nothing_are_an_error_that_lists_both_sides(tmp_path):
    rows = make_rows(tmp_path / 'a.json', speed_of(at_rate(0.7, (1, 3, 4))))
    with pytest.raises(ValueError, match=r'none of the 1 speeds belongs to an evaluation: measured: vit_digits, 64 px, '
                                         r'64 > .* at blocks \(1, 3, 4\), fused; evaluated: vit_digits, 64 px, '
                                         r'64 > .* at blocks \(0, 2, 4\), fused'):
        read_results([known_run(tmp_path / 'run'), rows])


def test_evaluation_under_another_plan_than_the_config_has_no_identity_by_it(tmp_path):
    run_of = known_run(tmp_path / 'run', at_rate(0.5))
    with pytest.raises(ValueError, match='plan unknown'):
        read_results([run_of, make_rows(tmp_path / 'a.json', speed_of(PLAN))])


@pytest.mark.parametrize('told, said', [
    ({'measurement': 'input', 'rows': [{'name': 'decode'}]}, 'holds the measurement of input, .* model --json'),
    ({'model': 'vit_digits', 'tokens': [9]}, 'is no JSON with "rows"'), ([1], 'is no JSON with "rows"')])
def test_json_of_another_kind_is_refused(tmp_path, told, said):
    (tmp_path / 'a.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match=said):
        read_results([tmp_path / 'a.json'])


def test_top1_of_a_file_is_in_percent_where_one_row_is(tmp_path, caplog):
    def top1_of(*values):
        rows = [{'name': str(at), 'top1': value, 'macs': 1} for at, value in enumerate(values)]
        return [result.top1 for result in read_results([make_rows(tmp_path / 'a.json', *rows)]).results]

    assert top1_of(0.795, 1) == [0.795, 1] and top1_of(0, 100) == [0, 1] and not caplog.text
    assert top1_of(79.5, 0.9) == pytest.approx([0.795, 0.009])
    assert 'a.json: top1 is in percent, as 79.5 is above 1, so 0.9 is read as 0.9 %' in caplog.text


@pytest.mark.parametrize(('row', 'said'), [
    ({'top1': 798}, 'top1 798 is above 100 %'), ({'rate': '0.7'}, "rate '0.7' is not a number"),
    ({'image_size': [64]}, r'image_size \[64\] is not a whole number'), ({'macs': 'x'}, "'x' is neither")])
def test_row_of_a_wrong_type_or_range_is_refused_with_its_file(tmp_path, row, said):
    with pytest.raises(ValueError, match=f'a.json: {said}'):
        read_results([make_rows(tmp_path / 'a.json', {'name': 'a', 'images_per_second': 5} | row)])


def test_a_speed_of_null_is_joined_to_nothing(tmp_path):
    rows = make_rows(tmp_path / 'a.json', speed_of(PLAN, None))
    assert [result.speed for result in read_results([known_run(tmp_path / 'run'), rows]).results] == [7]


@pytest.mark.parametrize('changes', [
    {'plan': {'tokens': 3}}, {'preprocessing': {'image_size': [64]}}, {'preprocessing': {'mean': [[1]]}}, {'step': '2'},
    {'data': 5}, {'metrics': {'top1': 0.5, 'macs': 10, 'images': '7'}}], ids=str)
def test_evaluation_file_with_a_wrong_type_is_left_out_with_a_warning(tmp_path, caplog, changes):
    run_of = known_run(tmp_path / 'run')
    write_evaluation(run_of, at_rate(0.5), 0.3, **changes)
    assert [result.label for result in read_results([run_of]).results] == ['0.7']
    assert 'json is left out: it holds no evaluation' in caplog.text
    file, = run_of.glob('evaluate-*.json')
    file.write_text(json.dumps(json.loads(file.read_text()) | {'workdir': 5}))
    with pytest.raises(ValueError, match=r'json: "workdir": 5 is no path'):
        read_results([file])


OTHERWISE = {'data': {'source': 'folder', 'name': '', 'split': 'val'},
             'preprocessing': {'image_size': 64, 'mean': [0.5] * 3, 'std': [0.2] * 3, 'eval_crop': 0.9}}


@pytest.mark.parametrize('group, key, value', [
    ('data', 'split', 'test'), ('data', 'source', 'digits'), ('preprocessing', 'mean', [0.4] * 3),
    ('preprocessing', 'std', [0.3] * 3), ('preprocessing', 'eval_crop', 1.0)])
def test_evaluation_of_other_data_or_preprocessing_is_left_out_with_a_warning(tmp_path, caplog, group, key, value):
    run_of = known_run(tmp_path / 'run', **{
        'data.source': 'folder', 'data.name': 'imagenet2012', 'data.test_split': 'auto', 'data.eval_crop': 0.9,
        'data.mean': [0.5] * 3, 'data.std': [0.2] * 3, 'recorded': {'test': {'split': 'val'}}})
    write_evaluation(run_of, at_rate(0.5), 0.3, **OTHERWISE)
    write_evaluation(run_of, at_rate(1.0), 0.6, **OTHERWISE | {group: OTHERWISE[group] | {key: value}})
    assert {result.label for result in read_results([run_of]).results} == {'0.7', '0.5'}
    assert f'): {key} ' in caplog.text and caplog.text.count(' there, ') == 1


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(tradeoff.Figure, 'savefig', lambda figure, *_, **__: drawn.append(figure))
    results = [Result(name, '0.5', 0.9, 10**6, None) for name in ('$a_{', '_b', r'$\bad$')]
    tradeoff.tradeoff_plot(results, tmp_path / 'names.png')
    drawn[0].canvas.draw()
    legend = drawn[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [r'\$a_{', ' _b', r'\$\bad\$']
