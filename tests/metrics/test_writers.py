import json
import math
import pathlib
import signal
import struct
import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from evit_jax.metrics import writers
from evit_jax.metrics.writers import ConsoleWriter, JsonlWriter, TensorboardWriter, create_writer, read_metrics

ROOT = pathlib.Path(__file__).parents[2]


def write(path, *lines):
    writer = JsonlWriter(path)
    for step, scalars in lines:
        writer.write_scalars(step, scalars)
    writer.close()


def read_events(logdir):
    """Every event of every file in `logdir`, oldest first; their checksums hold."""
    events = []
    for path in logdir.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            record = data[12:12 + length]
            assert struct.unpack('<II', data[8:12] + data[12 + length:16 + length]) == (
                masked_crc32c(data[:8]), masked_crc32c(record))
            events.append(event_pb2.Event.FromString(record))
            data = data[16 + length:]
    return sorted(events, key=lambda event: event.wall_time)


def scalars_of(events):
    return [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]


def test_written_scalars_are_read_back_exactly_in_order_of_step(tmp_path):
    path = tmp_path / 'deep' / 'metrics.jsonl'
    write(path, (20, {'loss': 0.1, 'lr': np.float32(3e-4)}), (10, {'loss': np.array(2.5)}))
    assert read_metrics(path) == [{'step': 10, 'loss': 2.5}, {'step': 20, 'loss': 0.1, 'lr': float(np.float32(3e-4))}]


def test_last_value_of_each_step_and_name_counts(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'loss': 3.0}), (2, {'loss': 2.0, 'lr': 0.1}), (3, {'loss': 1.0}))
    write(path, (2, {'loss': 2.5}), (2, {'top1': 0.5}))  # resumed from step 1
    assert read_metrics(path) == [
        {'step': 1, 'loss': 3.0}, {'step': 2, 'loss': 2.5, 'lr': 0.1, 'top1': 0.5}, {'step': 3, 'loss': 1.0}]


def test_non_finite_values_survive_as_strict_json(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'a': math.nan, 'b': math.inf, 'c': -math.inf}))
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))
    (record,) = read_metrics(path)
    assert math.isnan(record['a']) and record['b'] == math.inf and record['c'] == -math.inf


@pytest.mark.parametrize('cut', range(1, 24))
def test_a_last_line_cut_anywhere_is_left_out_then_mended(tmp_path, cut):
    path = tmp_path / 'metrics.jsonl'
    write(path, (1, {'loss': 3.0}), (2, {'größe': 1.0}))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    complete = cut == 1  # only the end of the line is missing
    assert [record['step'] for record in read_metrics(path)] == ([1, 2] if complete else [1])
    write(path, (3, {'loss': 1.0}))
    assert [record['step'] for record in read_metrics(path)] == ([1, 2, 3] if complete else [1, 3])


def test_a_broken_line_before_the_last_is_named(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    path.write_text('{"step": 1}\n{"step": 2, \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r'line 2 of .*metrics\.jsonl'):
        read_metrics(path)


def test_hparams_are_kept_but_are_no_metric(tmp_path):
    writer = JsonlWriter(tmp_path / 'metrics.jsonl')
    writer.write_hparams({'model.name': 'deit_s', 'clip': math.inf, 'reduce_at': (3, 6), 'path': tmp_path})
    writer.write_scalars(1, {'loss': 1.0})
    writer.close()
    first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
    assert first == {'hparams': {
        'model.name': 'deit_s', 'clip': 'Infinity', 'reduce_at': [3, 6], 'path': str(tmp_path)}}
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 1.0}]


def test_a_metric_named_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'step'"):
        write(tmp_path / 'metrics.jsonl', (1, {'step': 2.0}))


def test_written_lines_survive_a_kill_and_no_writer_or_picture_imports_jax_or_pyplot(tmp_path):
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


def test_default_writer_fills_the_jsonl_and_the_event_file(tmp_path):
    writer = create_writer(tmp_path)
    writer.write_scalars(7, {'train/loss': 1.5})
    writer.flush()  # not closed: what is flushed is on disk
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 7, 'train/loss': 1.5}]
    assert scalars_of(read_events(tmp_path / 'tensorboard')) == [(7, 'train/loss', 1.5)]
    writer.close()


def test_a_resumed_run_keeps_the_earlier_events_and_hides_its_later_steps(tmp_path):
    for resumed_at, step in ((0, 5), (4, 5)):  # within one second
        writer = TensorboardWriter(tmp_path, resumed_at)
        writer.write_scalars(step, {'loss': 1.0 + resumed_at})
        writer.close()
    events = read_events(tmp_path)
    assert scalars_of(events) == [(5, 'loss', 1.0), (5, 'loss', 5.0)]
    starts = [event.step for event in events if event.session_log.status == event_pb2.SessionLog.START]
    assert starts == [5]


def test_images_of_floats_and_of_bytes_become_the_same_event(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    writer = TensorboardWriter(tmp_path)
    floats = pixels[0] * (0.999999 / 255)  # a little less than the bytes: to be rounded, not cut
    writer.write_images(3, {'bytes': pixels, 'floats': floats, 'two': np.concatenate([pixels, pixels])})
    writer.write_hparams({'lr': 0.1, 'name': 'deit_s', 'reduce_at': (3, 6)})
    writer.close()
    events = read_events(tmp_path)
    images = {value.tag: value.image for event in events for value in event.summary.value if event.step == 3}
    assert list(images) == ['bytes', 'floats', 'two/0', 'two/1']
    assert len({image.encoded_image_string for image in images.values()}) == 1
    assert (images['bytes'].height, images['bytes'].width) == (16, 16)
    with pytest.raises(ValueError, match=r'image .flat. has shape'):
        writer.write_images(3, {'flat': np.zeros((4, 4))})


def test_console_writes_one_line_and_only_when_asked(tmp_path):
    with mock.patch.object(writers.logging, 'info') as info:
        create_writer(tmp_path / 'quiet').write_scalars(20, {'loss': 1.0})
        assert not info.called
        create_writer(tmp_path / 'loud', console=True).write_scalars(20, {'loss': 1.23456, 'lr': 5e-4})
    (call,) = info.call_args_list
    assert call.args[0] % call.args[1:] == '[20] loss=1.235, lr=0.0005'


def test_no_workdir_writes_no_file(tmp_path, monkeypatch):
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


def test_clu_without_tensorflow_says_what_to_install(tmp_path, monkeypatch):
    use_clu(monkeypatch, None)
    with pytest.raises(ValueError, match=r'needs TensorFlow: pip install .evit_jax\[tf\]'):
        create_writer(tmp_path, 'clu')


def test_clu_writes_the_events_beside_our_jsonl(tmp_path, monkeypatch):
    theirs = mock.Mock()
    module = types.SimpleNamespace(create_default_writer=mock.Mock(return_value=theirs))
    use_clu(monkeypatch, module)
    writer = create_writer(tmp_path, 'clu')
    writer.write_scalars(1, {'loss': 2.0})
    writer.close()
    module.create_default_writer.assert_called_once_with(str(tmp_path / 'tensorboard'))
    theirs.write_scalars.assert_called_once_with(1, {'loss': 2.0})
    theirs.close.assert_called_once_with()
    assert read_metrics(tmp_path / 'metrics.jsonl') == [{'step': 1, 'loss': 2.0}]


@pytest.mark.parametrize('arguments, message', [
    (('runs', 'wandb'), "unknown writer 'wandb': there are default, clu"),
    (('s3://bucket/run', 'default'), 's3://bucket/run cannot be used'),
])
def test_what_cannot_be_written_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_writer(*arguments)
    assert not list(tmp_path.iterdir())


def test_every_writer_has_the_whole_interface():
    wanted = {name for name in vars(writers.MetricWriter) if not name.startswith('_')}
    assert wanted == {'write_scalars', 'write_images', 'write_hparams', 'flush', 'close'}
    for writer in (JsonlWriter, TensorboardWriter, ConsoleWriter, writers.MultiWriter):
        assert wanted <= vars(writer).keys()
