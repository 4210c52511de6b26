"""Metric writers: values are read back exactly, and no value is lost or repeated after a kill and a resume."""

import json
import math
import pathlib
import signal
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from evit_jax.metrics import writers
from evit_jax.metrics.writers import JsonlWriter, TensorboardWriter, create_writer, read_metrics
from tests.helpers.events import read_events, scalars_of

ROOT = pathlib.Path(__file__).parents[2]


def write(path, *lines):
    writer = JsonlWriter(path)
    for step, scalars in lines:
        writer.write_scalars(step, scalars)
    writer.close()


def test_read_metrics_returns_the_written_scalars_exactly_ordered_by_step(tmp_path):
    path = tmp_path / 'deep' / 'metrics.jsonl'
    write(path, (20, {'loss': 0.1, 'lr': np.float32(3e-4)}), (10, {'loss': np.array(2.5)}))
    assert read_metrics(path) == [{'step': 10, 'loss': 2.5}, {'step': 20, 'loss': 0.1, 'lr': float(np.float32(3e-4))}]


def test_read_metrics_of_a_step_written_twice_returns_the_last_values(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'loss': 3.0}), (2, {'loss': 2.0, 'lr': 0.1}), (3, {'loss': 1.0}))
    write(path, (2, {'loss': 2.5}), (2, {'top1': 0.5}))  # resumed from step 1
    assert read_metrics(path) == [
        {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.5, 'lr': 0.1, 'top1': 0.5}, {'step': 3, 'loss': 1.0}]


def test_jsonl_of_non_finite_values_is_strict_json_and_read_back(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'a': math.nan, 'b': math.inf, 'c': -math.inf}))
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    (record,) = read_metrics(path)
    assert math.isnan(record['a']) and record['b'] == math.inf and record['c'] == -math.inf


@pytest.mark.parametrize('cut', range(1, 24))
def test_jsonl_with_an_incomplete_last_line_is_read_without_it_and_repaired(tmp_path, cut):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'loss': 3.0}), (2, {'größe': 1.0}))
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    complete = cut == 1  # only the end of the line is missing
    assert [record['step'] for record in read_metrics(path)] == ([1, 2] if complete else [1])
    write(path, (3, {'loss': 1.0}))
    assert [record['step'] for record in read_metrics(path)] == ([1, 2, 3] if complete else [1, 3])


def test_read_metrics_with_a_broken_line_before_the_last_names_it(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r'line 2 of .*metrics\.jsonl'):
        read_metrics(path)


def test_jsonl_hparams_are_written_and_not_read_as_metrics(tmp_path):
    writer = JsonlWriter(tmp_path / 'metrics.jsonl')
    writer.write_hparams({'model.name': 'deit_s', 'clip': math.inf, 'reduce_at': (3, 6), 'path': tmp_path})
    writer.write_scalars(1, {'loss': 1.0})
    writer.close()
    first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
    assert first == {'hparams': {
        'model.name': 'deit_s', 'clip': 'Infinity', 'reduce_at': [3, 6], 'path': str(tmp_path)}}
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 1.0}]


def test_jsonl_metric_named_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        write(tmp_path / 'metrics.jsonl', (1, {'step': 2.0}))


def test_writer_of_a_killed_process_loses_nothing_and_imports_no_jax_or_pyplot(tmp_path):
    code = f'''
import os, signal, sys
from evit_jax.viz import curves, kept
from evit_jax.metrics.writers import create_writer
writer = create_writer({str(tmp_path)!r})
writer.write_scalars(1, {{'jax': 'jax' in sys.modules, 'pyplot': 'matplotlib.pyplot' in sys.modules}})
os.kill(os.getpid(), signal.SIGKILL)
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 1, 'jax': 0.0, 'pyplot': 0.0}]
    assert scalars_of(read_events(tmp_path / 'tensorboard')) == [(1, 'jax', 0.0), (1, 'pyplot', 0.0)]


def test_default_writer_writes_the_jsonl_and_the_event_file(tmp_path):
    writer = create_writer(tmp_path)
    writer.write_scalars(7, {'train/loss': 1.5})
    writer.flush()  # not closed: flushed records are on disk
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 7, 'train/loss': 1.5}]
    assert scalars_of(read_events(tmp_path / 'tensorboard')) == [(7, 'train/loss', 1.5)]
    writer.close()


def test_tensorboard_writer_of_a_resumed_run_keeps_earlier_events_and_hides_later_steps(tmp_path):
    for resumed_at, step in ((0, 5), (4, 5)):  # within one second
        writer = TensorboardWriter(tmp_path, resumed_at)
        writer.write_scalars(step, {'loss': 1.0 + resumed_at})
        writer.close()
    events = read_events(tmp_path)
    assert scalars_of(events) == [(5, 'loss', 1.0), (5, 'loss', 5.0)]
    starts = [event.step for event in events if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [5]


def test_tensorboard_writer_writes_hparams_of_any_type(tmp_path):
    writer = TensorboardWriter(tmp_path)
    writer.write_hparams({'lr': 0.1, 'name': 'deit_s', 'reduce_at': (3, 6)})
    writer.close()
    tags = {value.tag for event in read_events(tmp_path) for value in event.summary.value}
    assert {'_hparams_/experiment', '_hparams_/session_start_info'} <= tags


def test_create_writer_without_workdir_writes_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = create_writer(None)
    writer.write_scalars(1, {'loss': 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def use_clu(monkeypatch, module):
    import clu
    monkeypatch.setitem(sys.modules, 'clu.metric_writers', module)
    monkeypatch.setattr(clu, 'metric_writers', module, raising=False)
    if module is None:
        monkeypatch.delattr(clu, 'metric_writers')


def test_clu_writer_without_tensorflow_names_the_package_to_install(tmp_path, monkeypatch):
    use_clu(monkeypatch, None)
    with pytest.raises(ValueError, match=r'needs TensorFlow: pip install .evit_jax\[tf\]'):
        create_writer(tmp_path, 'clu')


def test_clu_writer_writes_event_files_and_the_jsonl(tmp_path, monkeypatch):
    clu_writer = mock.Mock()
    module = types.SimpleNamespace(create_default_writer=mock.Mock(return_value=clu_writer))
    use_clu(monkeypatch, module)
    writer = create_writer(tmp_path, 'clu')
    writer.write_scalars(1, {'loss': 2.0})
    writer.close()
    module.create_default_writer.assert_called_once_with(str(tmp_path / 'tensorboard'))
    clu_writer.write_scalars.assert_called_once_with(1, {'loss': 2.0})
    clu_writer.close.assert_called_once_with()
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 2.0}]


@pytest.mark.parametrize('arguments, message', [
    (('runs', 'wandb'), "unknown writer 'wandb': there are default, clu"),
    (('s3://bucket/run', 'default'), 's3://bucket/run cannot be used'),
])
def test_create_writer_of_unknown_kind_or_address_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_writer(*arguments)
    assert not list(tmp_path.iterdir())


def test_every_writer_implements_the_interface():
    expected = {name for name in vars(writers.MetricWriter) if not name.startswith('_')}
    assert expected == {'write_scalars', 'write_hparams', 'flush', 'close'}
    for writer in (JsonlWriter, TensorboardWriter, writers.MultiWriter):
        assert expected <= vars(writer).keys()
