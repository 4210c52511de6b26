"""Model benchmarks: the measured rows, and the program. Models are tiny; no speed is asserted."""

import jax
import numpy as np
import pytest

from evit_jax import models
from evit_jax.benchmarks import cases, model_speed, model_tables, report, timing
from evit_jax.configs import digits
from tests.helpers import program_modules
from tests.helpers.benchmarks import measure_briefly, tiny, tiny_workloads  # noqa: F401

benchmark = program_modules.module_fixture('benchmark')


def test_measure_rows_are_consistent():
    workloads = tiny_workloads(batch_sizes=[1, 4])
    measurement, plans = measure_briefly(workloads), {workload.rate: workload.plan for workload in workloads}
    rows = {(row['rate'], row['batch_size']): row for row in measurement['rows']}
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
        assert 0 < row['executed_macs'] == config.executed_macs(plans[rate]) < row['macs']
        assert row['share_of_matmul'] > 0 and row['ours_over_this'] == 1
    assert measurement['threads'] == report.num_cpus() and measurement['matmul_flops_per_second'].keys() == {'float32'}


def test_measure_compiles_nothing_while_timing(monkeypatch):
    compiled, counts = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None)
    interleave = timing.interleave

    def watched(*arguments, **options):
        before = len(compiled)
        times = interleave(*arguments, **options)
        counts.append((before, len(compiled)))
        return times

    monkeypatch.setattr(timing, 'interleave', watched)
    measure_briefly(tiny_workloads())
    (before, after), = counts
    assert before > 0 and after == before


def test_inference_case_inputs_take_turns():
    case = cases.inference_case(tiny_workloads()[0], cases.ModelCache())
    logits = [case.fetch(case.call(number)) for number in range(cases.NUM_INPUTS + 1)]
    assert len({array.tobytes() for array in logits}) == cases.NUM_INPUTS
    np.testing.assert_array_equal(logits[0], logits[-1])


def test_measure_memory_uses_the_device_where_the_peak_rises(monkeypatch):
    stats = iter([{'peak_bytes_in_use': 100, 'bytes_in_use': 60}, {'peak_bytes_in_use': 130, 'bytes_in_use': 60},
                  {'peak_bytes_in_use': 130, 'bytes_in_use': 60}, {'peak_bytes_in_use': 130, 'bytes_in_use': 60}])
    monkeypatch.setattr(cases, 'device', lambda: type('Device', (), {'memory_stats': lambda self: next(stats)})())
    case = cases.BenchmarkCase(tiny_workloads()[0], 'jax', lambda number: None, lambda result: None, argument_bytes=25,
                               peak_bytes=88)
    assert model_speed.measure_memory(case) == (130 - 60 + 25, 'device')
    assert model_speed.measure_memory(case) == (88, 'compiler')  # the peak did not rise


def test_check_logits_that_differ_raises_with_the_difference():
    ours = cases.inference_case(tiny_workloads()[1], cases.ModelCache())
    model_speed.check_logits(ours, ours)
    near = ours._replace(engine='near', fetch=lambda logits: np.asarray(logits) * (1 + 1e-5))
    model_speed.check_logits(ours, near)
    for wrong in (lambda logits: np.asarray(logits) * 1.01, lambda logits: np.asarray(logits) * np.nan):
        with pytest.raises(ValueError, match=r'other differ from ours by (0\.01|nan) .*not the same model'):
            model_speed.check_logits(ours, ours._replace(engine='other', fetch=wrong))


def test_measure_training_step_continues_from_its_own_state(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, '_config', lambda example: digits.get_config())
    workload = tiny_workloads(rates=[0.5], train=True)[-1]
    config = benchmark._training_config(workload)
    assert (config.model.name, config.model.classes, config.batch_size, config.keep.rate) == ('tiny', 5, 2, 0.5)
    mesh = benchmark.sharding.data_mesh(2, jax.devices()[:1])
    measurement = measure_briefly([workload], setup_run=lambda workload: benchmark.experiment.setup(
        config, mesh=mesh, sources=benchmark._unread_sources(config)))
    row, = measurement['rows']
    assert (row['step'], row['speedup_over_dense'], row['executed_macs']) == ('train', None, None)
    assert row['images_per_second'] > 0
    assert row['memory_bytes'] > 4 * 4 * row['parameters']  # weights, EMA, two moments
    assert any('No speed-up without rate 1' in line for line in model_tables.remarks(measurement))


def test_training_config_with_r_replaces_the_plan_of_the_config(benchmark, monkeypatch):
    config = digits.get_config()
    config.keep.macs, config.reducer.decreasing = 0.7, True
    monkeypatch.setattr(benchmark, '_config', lambda example: config)
    workload = tiny_workloads(rates=[1.0], reducers=['tome'], r=[2], train=True)[-1]
    changed = benchmark._training_config(workload)
    run = benchmark.experiment.setup(changed, mesh=benchmark.sharding.data_mesh(2, jax.devices()[:1]),
                                     sources=benchmark._unread_sources(changed))
    assert workload.train and run.plan == workload.plan
