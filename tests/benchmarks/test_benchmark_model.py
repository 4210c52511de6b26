"""The speed of models: what is combined, measured and reported. Tiny models; no speed is asserted."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import digits
from evit_jax import cli, models
from evit_jax.benchmarks import clock, model, model_tables, report, subjects
from evit_jax.benchmarks.cases import Case, choices, combine
from evit_jax.models.config import ViTConfig
from tests.helpers import doors

ROOT = pathlib.Path(__file__).parents[2]
COMBINED = {'names': ['tiny'], 'rates': [1.0, 0.5], 'fuse': [True], 'sizes': [], 'batches': [2], 'dtypes': ['float32']}

benchmark = doors.imported('benchmark')


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'tiny', ViTConfig(image_size=32, patch_size=8, width=16, depth=4, heads=2,
                                                        classes=5, init_std=0.2))
    monkeypatch.setattr(subjects, '_SQUARES', {'cpu': 64})


def cases(**changes):
    return combine(**COMBINED | changes)


def measure(found, **changes):
    return model.measure(found, **{'rounds': 3, 'seconds': 0.05} | changes)


@pytest.mark.parametrize('name, size, rate, giga', [
    ('deit_t', 224, 1, 1.25), ('deit_t', 224, 0.7, 0.82), ('deit_s', 224, 1, 4.60), ('deit_s', 224, 0.7, 3.03),
    ('deit_s', 224, 0.5, 2.31), ('deit_b', 224, 0.5, 8.82), ('deit_s', 272, 0.7, 4.56), ('deit_s', 304, 0.5, 4.44)])
def test_macs_are_those_of_the_paper(name, size, rate, giga):
    case, = cases(names=[name], sizes=[size], rates=[rate])
    assert case.macs / 1e9 == pytest.approx(giga, abs=0.005)


def test_every_combination_comes_once_and_dense_is_neither_fused_nor_not():
    found = cases(fuse=[True, False], batches=[1, 2], dtypes=['float32', 'bfloat16'], train=True)
    assert len(found) == len(set(found)) == 2 * 2 * 2 * 3  # steps, batches, dtypes; dense, fused, not fused
    assert found[0] == Case('tiny', 1.0, False, 32, 1, 'float32', ())
    assert {case.fused for case in found if case.rate == 1} == {False}
    assert all(case.dense in found for case in found)
    assert len({str(case) for case in found}) == len(found)


def test_every_reducer_is_a_case_and_dense_is_one_of_all():
    found = cases(methods=['evit', 'tome', 'random'], fuse=[True, False])
    said = [str(case).split(',')[0] + f', {case.reducer}' for case in found]
    assert said == ['tiny dense, evit', 'tiny 0.5 fused, evit', 'tiny 0.5 not fused, evit', 'tiny 0.5 merged, tome',
                    'tiny 0.5 fused, random', 'tiny 0.5 not fused, random']
    assert {case.dense for case in found} == {found[0]} and len({str(case) for case in found}) == len(found)


def test_r_is_a_case_of_every_reducer_that_merges_beside_the_rates_and_says_so():
    found = cases(methods=['evit', 'tome', 'pool'], rates=[1.0], merged=[2, 0])
    assert [str(case) for case in found] == [
        f'tiny {how}, 32 px, batch 2, float32' for how in ('dense', 'r=2 merged, tome', 'r=2 merged, pool')]
    assert found[1].plan.counts == (14, 12, 10, 8) and found[1].dense == found[0]
    row = measure(found[:2])['rows'][1]
    assert (row['r'], row['rate'], row['plan']) == (2, None, str(found[1].plan)) and row['speedup_over_dense'] > 0


def test_a_lowering_is_a_case_of_what_keeps_by_rank_and_says_so():
    found = cases(rates=[1.0, 0.7], methods=['evit', 'tome'], gather_impls=['', 'gather', 'product'])
    assert [(case.dense == case, str(case.reducer), case.gather_impl) for case in found] == [
        (True, 'evit', ''), (False, 'evit', ''), (False, 'evit', 'gather'), (False, 'evit', 'product'),
        (False, 'tome', '')]
    assert 'by product' in str(found[3]) and {case.dense for case in found} == {found[0]}


def test_blocks_that_drop_are_the_papers_in_a_model_as_deep():
    assert cases(names=['deit_s'])[-1].reduce_at == (3, 6, 9)
    assert cases(names=['deit_s'], reduce_at=[2])[-1].reduce_at == (2,)


@pytest.mark.parametrize('changes, said', [
    ({'names': ['deit_x']}, "unknown model 'deit_x': did you mean deit_"), ({'rates': []}, '--rates is empty'),
    ({'methods': ['tomme']}, "unknown reducer 'tomme': did you mean tome?"), ({'methods': []}, '--reducers is empty'),
    ({'methods': ['tome'], 'rates': [0.4]}, 'block 1: r=9 of 16 tokens cannot be merged by tome'),
    ({'merged': [2, 4]}, '--r=2,4 is of reducers that merge, and of --reducers=evit none does: add tome or pool'),
    ({'methods': ['pool'], 'merged': [9]}, r'r=9 would merge 9 of 16 tokens .* give 0 <= r <= 8'),
    ({'rates': [1.5]}, r'keep rate 1.5 is outside \(0, 1\]'), ({'batches': [4, 0]}, '--batches=4,0: a batch of 0'),
    ({'sizes': [33]}, 'image size 33 is not divisible by the patch size 8: use 32 or 40'),
    ({'reduce_at': [9]}, r'reduce_at=\(9,\): block 9 is outside 0..3')])
def test_a_combination_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        cases(**changes)


def test_words_that_are_no_numbers_or_unknown_are_refused():
    assert cli.numbers('rates', ['1', '.5'], float) == (1, 0.5)
    with pytest.raises(ValueError, match='--rates=1,x is no list of numbers: give them with commas between'):
        cli.numbers('rates', ['1', 'x'], float)
    with pytest.raises(ValueError, match=r'--batches=1\.5 is no list of whole numbers'):
        cli.numbers('batches', ['1.5'], int)
    with pytest.raises(ValueError, match=r"--fuse=true,maybe: 'maybe' is unknown, there are true, false"):
        choices('--fuse', ['true', 'maybe'], {'true': True, 'false': False})


def test_rows_say_what_was_measured_and_add_up():
    asked = cases(batches=[1, 4])
    found, found_plans = measure(asked), {case.rate: case.plan for case in asked}
    rows = {(row['rate'], row['batch_size']): row for row in found['rows']}
    assert set(rows) == {(1.0, 1), (0.5, 1), (1.0, 4), (0.5, 4)}
    for (rate, batch), row in rows.items():
        config = models.get_config('tiny')
        assert row['parameters'] == config.parameters() and row['compile_seconds'] > 0
        assert row['memory_bytes'] > 4 * row['parameters'] and row['memory_from'] == 'compiler'
        assert row['images_per_second'] == pytest.approx(batch / np.median(row['seconds_per_call']))
        assert (row['latency_p50_ms'] is not None) == (batch == 1)
        assert row['calls_timed'] >= (100 if batch == 1 else 3)
        dense = rows[1.0, batch]
        assert row['macs_dense_over_this'] == dense['macs'] / row['macs'] >= 1
        ratios = np.divide(dense['seconds_per_call'], row['seconds_per_call'])
        assert row['speedup_over_dense'] == pytest.approx(np.median(ratios))
        assert 0 < row['executed_macs'] == config.executed_macs(found_plans[rate]) < row['macs']
        assert row['share_of_matmul'] > 0 and row['ours_over_this'] == 1
    assert found['threads'] == report.cpus() and found['matmul_flops_per_second'].keys() == {'float32'}


def test_nothing_is_compiled_while_the_clock_runs(monkeypatch):
    compiled, seen = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None)
    interleave = clock.interleave

    def watched(*arguments, **get_reducer):
        before = len(compiled)
        times = interleave(*arguments, **get_reducer)
        seen.append((before, len(compiled)))
        return times

    monkeypatch.setattr(clock, 'interleave', watched)
    measure(cases())
    (before, after), = seen
    assert before > 0 and after == before


def test_inputs_take_turns_and_results_differ():
    subject = subjects.inference(cases()[0], subjects.ModelCache())
    logits = [subject.fetch(subject.call(number)) for number in range(subjects.INPUTS + 1)]
    assert len({array.tobytes() for array in logits}) == subjects.INPUTS
    np.testing.assert_array_equal(logits[0], logits[-1])


def test_the_device_is_asked_for_memory_where_it_knows_its_peak(monkeypatch):
    stats = iter([{'peak_bytes_in_use': 100, 'bytes_in_use': 60}, {'peak_bytes_in_use': 130, 'bytes_in_use': 60},
                  {'peak_bytes_in_use': 130, 'bytes_in_use': 60}, {'peak_bytes_in_use': 130, 'bytes_in_use': 60}])
    monkeypatch.setattr(subjects, 'device', lambda: type('Device', (), {'memory_stats': lambda self: next(stats)})())
    subject = subjects.BenchmarkCase(cases()[0], 'jax', lambda number: None, lambda result: None, arguments=25,
                                     needed=88)
    assert model._memory(subject) == (130 - 60 + 25, 'device')
    assert model._memory(subject) == (88, 'compiler')  # the peak was another's


def test_logits_that_differ_end_the_measurement_with_the_difference():
    ours = subjects.inference(cases()[1], subjects.ModelCache())
    model.agree(ours, ours)
    near = ours._replace(engine='near', fetch=lambda logits: np.asarray(logits) * (1 + 1e-5))
    model.agree(ours, near)
    for wrong in (lambda logits: np.asarray(logits) * 1.01, lambda logits: np.asarray(logits) * np.nan):
        with pytest.raises(ValueError, match=r'other differ from ours by (0\.01|nan) .*not the same model'):
            model.agree(ours, ours._replace(engine='other', fetch=wrong))


def test_the_training_step_is_the_runs_and_goes_on_from_its_own_state(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, '_config', lambda example: digits.get_config())
    case = cases(rates=[0.5], train=True)[-1]
    config = benchmark._config_of(case)
    assert (config.model.name, config.model.classes, config.batch_size, config.keep.rate) == ('tiny', 5, 2, 0.5)
    mesh = benchmark.sharding.data_mesh(2, jax.devices()[:1])
    found = measure([case], run_of=lambda case: benchmark.experiment.setup(config, mesh=mesh,
                                                                            sources=benchmark._generated(config)))
    row, = found['rows']
    assert (row['step'], row['speedup_over_dense'], row['executed_macs']) == ('train', None, None)
    assert row['images_per_second'] > 0
    assert row['memory_bytes'] > 4 * 4 * row['parameters']  # weights, average, two moments
    assert any('No speed-up without rate 1' in line for line in model_tables.remarks(found))


def test_a_training_step_that_merges_r_takes_nothing_of_the_configs_own_plan(benchmark, monkeypatch):
    config = digits.get_config()
    config.keep.macs, config.reducer.decreasing = 0.7, True
    monkeypatch.setattr(benchmark, '_config', lambda example: config)
    case = cases(rates=[1.0], methods=['tome'], merged=[2], train=True)[-1]
    found = benchmark._config_of(case)
    laid = benchmark.experiment.setup(found, mesh=benchmark.sharding.data_mesh(2, jax.devices()[:1]),
                                  sources=benchmark._generated(found))
    assert case.train and laid.plan == case.plan


def measured(**changes):
    row = {'case': 'a case', 'engine': 'jax', 'step': 'inference', 'parameters': 22_050_000, 'macs': 4_600_000_000,
           'executed_macs': 4_310_000_000,
           'compile_seconds': 12.34, 'memory_bytes': 1.2e8, 'memory_from': 'compiler', 'images_per_second': 1234.56,
           'latency_p50_ms': None, 'latency_p95_ms': None, 'speedup_over_dense': 1.5, 'macs_dense_over_this': 1.518,
           'share_of_matmul': 0.4, 'ours_over_this': 1.0}
    other = row | {'engine': 'torch', 'images_per_second': 1000.0, 'ours_over_this': 1.23}
    return {'device': 'cpu', 'platform': 'cpu', 'threads': 2, 'rounds': 9, 'torch': '2.13',
            'matmul_flops_per_second': {'float32': 2e11}, 'rows': [row, other]} | changes


def test_tables_set_speed_beside_macs_and_engines_side_by_side():
    (headers, rows), (engines, beside) = model_tables.tables(measured())
    assert dict(zip(headers, rows[0])) == {
        '': 'a case', 'M params': '22.05', 'G MACs': '4.60', 'executed': '4.31', 'compile s': '12.3', 'MB': '120.0',
        'images/s': '1,234.6', 'p50 ms': '-', 'p95 ms': '-', 'speed-up': '1.50', 'fewer MACs': '1.52',
        'of product': '40.0%'}
    assert (engines, beside) == (('images/s', 'jax', 'torch'), [('a case', '1,234.6', '1,000.0 (1.23)')])


def test_the_markdown_has_tables_machine_versions_and_date():
    text = model_tables.markdown(measured())
    assert '| a case | 22.05 | 4.60 | 4.31 |' in text and '| --- | ---: | ---: |' in text
    assert re.search(r'\n20\d\d-\d\d-\d\d, .*, 2 threads on both sides, .*jax \d.*torch 2.13\n', text)
    assert "by the compiler's analysis" in text and '200 GFLOP/s in float32' in text


def test_a_file_that_cannot_be_written_is_refused_before_and_one_that_can_is_not_made(tmp_path):
    (tmp_path / 'file').write_text('kept')
    with pytest.raises(ValueError, match=r'--json=.*file/x.json cannot be written .*: name a file in a folder'):
        report.check_writable('--json', tmp_path / 'file' / 'x.json')
    with pytest.raises(ValueError, match=r'--markdown=.* cannot be written'):
        report.check_writable('--markdown', tmp_path)
    report.check_writable('--json', tmp_path / 'file')
    report.check_writable('--json', tmp_path / 'new' / 'x.json')
    assert (tmp_path / 'file').read_text() == 'kept' and not (tmp_path / 'new' / 'x.json').exists()


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.benchmark', 'model', *arguments], cwd=ROOT,
                          capture_output=True, text=True)


def test_the_program_prints_a_table_and_writes_both_files(tmp_path):
    done = run('--models=vit_digits', '--rates=0.5', '--batches=1', '--rounds=2', '--seconds=0.2',
               f'--json={tmp_path / "m.json"}', f'--markdown={tmp_path / "m.md"}')
    assert done.returncode == 0, done.stderr
    assert re.search(r'vit_digits 0.5 fused, 64 px, batch 1, float32 +0\.37 +0\.0163 +0\.0159 ', done.stdout)
    assert 'about' in done.stderr and 'round 2 of 2' in done.stderr
    written = json.loads((tmp_path / 'm.json').read_text())
    assert written['machine']['date'] and written['rows'][0]['macs'] == 16300160
    assert '| vit_digits 0.5 fused' in (tmp_path / 'm.md').read_text()


@pytest.mark.parametrize('arguments, said', [
    (('--image_sizes=64,x',), 'error: --image_sizes=64,x is no list of whole numbers: give them with commas between\n'),
    (('--dtypes=float8',), "error: --dtypes=float8: 'float8' is unknown, there are float32, bfloat16\n"),
    (('--train',), 'error: give --config FILE, as in: python -m evit_jax.benchmark model --train --config '
                   'configs/deit_s.py\n')])
def test_the_program_ends_with_one_line_on_what_it_cannot_measure(arguments, said):
    done = run(*arguments)
    assert (done.returncode, done.stderr) == (2, said)
