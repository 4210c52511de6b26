"""The GPU benchmark, run on the CPU with tiny models: its groups, its time limit, attention and the program."""

import json
import types

import pytest
from absl import flags
from absl.testing import flagsaver

from evit_jax import models
from evit_jax.benchmarks import attention_speed, gpu
from evit_jax.configs import digits
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from tests.helpers import program_modules
from tests.helpers.benchmarks import time_once, tiny  # noqa: F401

benchmark = program_modules.module_fixture('benchmark')
LIMITS = gpu.Limits(batch_sizes=(2, 1), train_batch=2, dtype='float32', rounds=2, group_seconds=0.05)


@pytest.fixture(scope='module')
def attention():
    return attention_speed.measure('float32', (5, 9), batch=2, heads=2, channels=4, rounds=2)


@pytest.fixture(autouse=True)
def brief(attention, monkeypatch):
    monkeypatch.setattr(attention_speed, 'measure', lambda dtype: attention)


def test_groups_have_the_first_batch_of_all_models_before_training_and_other_batches():
    measured = [gpu.MeasuredModel('tiny', 32, trained=True), gpu.MeasuredModel('dinov2_s', 518, gpu.DINOV2_S)]
    groups = list(gpu.groups(measured, LIMITS))
    assert [(group[0].model, group[0].batch_size, group[0].train) for group in groups] == [
        ('tiny', 2, False), ('dinov2_s', 2, False), ('tiny', 2, True), ('tiny', 1, False), ('dinov2_s', 1, False)]
    for group in groups:
        dense, rate, half, merged = group
        assert not dense.plan.reductions and (rate.rate, half.rate) == (0.7, 0.5)
        assert merged.reducer.name == 'tome' and merged.macs <= 0.5 * dense.macs
        assert merged._replace(r=merged.r - 1).macs > 0.5 * dense.macs


def test_groups_have_plans_of_their_own_model_only():
    plan = PlanFile.of(make_plan(16, 4, tokens=[8], reduce_at=[1]), 'tiny', 32)
    measured = [gpu.MeasuredModel('tiny', 32), gpu.MeasuredModel('dinov2_s', 518, gpu.DINOV2_S)]
    tiny_group, other = list(gpu.groups(measured, LIMITS._replace(batch_sizes=(2,)), [plan]))
    assert tiny_group[-1].tokens == (8,) and len(other) == len(tiny_group) - 1


def test_measure_without_time_raises_and_with_little_time_lists_what_is_left_out(monkeypatch):
    measured = [gpu.MeasuredModel('tiny', 32)]
    with pytest.raises(ValueError, match='no group was measured within 0 minutes: give more --minutes'):
        gpu.measure(measured, LIMITS._replace(minutes=0.0), against=(), setup_run=None, on_group=list)
    clock, written = [0.0], []  # written: number of rows at each call

    def measure(group, **options):
        clock[0] += 40
        return {'rows': [{'batch_size': workload.batch_size} for workload in group]}

    monkeypatch.setattr(gpu, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu.model_speed, 'measure', measure)
    result = gpu.measure(measured, LIMITS._replace(minutes=1.0), against=(), setup_run=None,
                         on_group=lambda part: written.append(len(part['rows'])))
    assert len(result['rows']) == 4 and {row['batch_size'] for row in result['rows']} == {2}
    assert len(result['left_out']) == 4 and all('batch 1' in text for text in result['left_out'])
    assert written == [4]


def test_attention_implementations_return_equal_outputs(attention):
    names = {row['implementation'] for row in attention}
    assert names >= {'ours', 'xla'} and max(row['difference'] for row in attention) < 1e-5
    headers, lines = attention_speed.table(attention)
    assert headers[1:] == attention_speed.IMPLEMENTATIONS and [line[0] for line in lines] == ['5', '9']
    assert all(line[1] == '1.00x' for line in lines)


@pytest.mark.parametrize('count', [1, pytest.param(4, marks=pytest.mark.slow)])  # number of workloads of a group
def test_program_measures_inference_and_training_and_writes_json_and_markdown(benchmark, tmp_path, capsys,
                                                                                monkeypatch, count):
    time_once(monkeypatch)
    groups = gpu.groups
    monkeypatch.setattr(gpu, 'groups', lambda *arguments: [group[:count] for group in groups(*arguments)])
    file, page = tmp_path / 'gpu.json', tmp_path / 'gpu.md'
    with flagsaver.flagsaver():
        flags.FLAGS(['benchmark', '--models=tiny', '--batches=4', '--dtypes=float32', f'--config={digits.__file__}',
                     f'--json={file}', f'--markdown={page}'])
        benchmark.measure_gpu()
    content = json.loads(file.read_text())
    assert [row['step'] for row in content['rows']] == ['inference'] * count + ['train'] * count
    assert content['left_out'] == [] and content['attention']
    assert '| attention: tokens |' in page.read_text() and 'tiny dense, 32 px, batch 4' in capsys.readouterr().out


def test_program_writes_the_cases_that_did_not_fit(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark.gpu, 'measure', lambda *args, **options: {'rows': [], 'left_out': ['deit_b dense']})
    monkeypatch.setattr(benchmark, '_print', lambda measurement: None)
    with flagsaver.flagsaver():
        flags.FLAGS(['benchmark', f'--config={digits.__file__}', f'--json={tmp_path / "gpu.json"}'])
        benchmark.measure_gpu()
    assert json.loads((tmp_path / 'gpu.json').read_text())['left_out'] == ['deit_b dense']


def test_program_without_config_names_an_example(benchmark):
    with flagsaver.flagsaver():
        flags.FLAGS(['benchmark'])
        with pytest.raises(ValueError, match=r'give --config FILE, as in: .* gpu --config configs/deit_s.py'):
            benchmark.measure_gpu()


def test_default_models_have_configs_for_their_sizes():
    for model in gpu.MODELS:
        config = model.config or models.get_config(model.name)
        assert config.patches(model.image_size) >= 196
