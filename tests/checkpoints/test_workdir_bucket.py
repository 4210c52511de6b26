"""A workdir in a bucket: a local server with gcsfs, or the memory file system of fsspec without it.

The server implements the JSON API of Cloud Storage, so the libraries (etils, gcsfs, Orbax, tensorstore, Google's
client) are the real ones.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from evit_jax.checkpoints import continuation
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.lock import IN_USE_FILE, WorkdirLock
from evit_jax.checkpoints.manager import CheckpointManager, newest_step
from evit_jax.metrics import append_file
from evit_jax.metrics.writers import JsonlWriter, TensorboardWriter, create_writer, read_metrics
from evit_jax.runtime import storage
from evit_jax.training import loop
from tests.helpers import fake_bucket
from tests.helpers.events import read_events, scalars_of
from tests.helpers.tiny_run import command, final_parameters
from tests.helpers.tiny_run import config_of as tiny

ROOT = pathlib.Path(__file__).parents[2]
needs_gcsfs = pytest.mark.skipif(importlib.util.find_spec('gcsfs') is None,
                                 reason="gcsfs is not installed: pip install 'evit_jax[gcs]'")


class Memory(MemoryFileSystem):
    """An in-memory file system for `gs://` addresses."""
    store, pseudo_dirs = {}, ['']

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix('gs:/'))


@pytest.fixture(scope='module')
def server():
    with fake_bucket.serving('bucket', forbidden=['private']) as server:
        yield server


@pytest.fixture
def gcs(server, monkeypatch):
    """The server, with an empty bucket `gs://bucket`."""
    for key, value in server.environment.items():
        monkeypatch.setenv(key, value)
    server.objects['bucket'].clear()
    return server


@pytest.fixture(params=['memory', pytest.param('server', marks=needs_gcsfs)])
def folder(request, monkeypatch):
    """The path `gs://bucket/run`, in each kind of bucket."""
    if request.param == 'server':
        request.getfixturevalue('gcs')
    else:
        for name in ('gcsfs', 'google.cloud.storage'):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        Memory.store.clear()
        monkeypatch.setattr(type(backend.fsspec_backend), '_get_filesystem', lambda self, name: Memory())
    return storage.as_path('gs://bucket/run')


def test_workdir_in_a_bucket_keeps_and_checks_config_and_classes(folder):
    continuation.open_workdir(folder, tiny().to_dict(), accept_changes=False)
    workdirs.record_classes(folder, ('cat', 'dog'))
    assert workdirs.saved_config(folder)['class_names'] == ['cat', 'dog']
    assert json.loads((folder / 'config.json').read_bytes())['model.classes'] == 2
    with pytest.raises(ValueError, match=r"gs://bucket/run holds a run on other classes .*'dog' there, 'cow' in"):
        workdirs.record_classes(folder, ('cat', 'cow'))


def test_writer_in_a_bucket_uploads_at_flush_and_the_next_writer_continues(folder):
    writer = create_writer(folder)
    writer.write_scalars(1, {'loss': 3.0})
    writer.flush()
    assert read_metrics(folder / 'metrics.jsonl') == [{'step': 1, 'loss': 3.0}]
    writer.write_scalars(2, {'loss': 2.0})
    later = create_writer(folder)  # the first writer is not closed yet, like that of a killed run
    later.write_scalars(3, {'loss': 1.0})
    later.close()
    assert [record['step'] for record in read_metrics(folder / 'metrics.jsonl')] == [1, 3]
    writer.close()  # its thread would log errors in later tests


def test_jsonl_in_a_bucket_is_uploaded_regularly(folder, monkeypatch):
    monkeypatch.setattr(append_file, '_WRITE_SECONDS', 0.05)
    writer = JsonlWriter(folder / 'metrics.jsonl')
    writer.write_scalars(1, {'loss': 3.0})
    deadline = time.monotonic() + 10
    while not (folder / 'metrics.jsonl').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read_metrics(folder / 'metrics.jsonl') == [{'step': 1, 'loss': 3.0}]
    writer.close()


def test_jsonl_in_a_bucket_continues_in_further_objects_and_rewrites_only_the_last(folder, monkeypatch):
    monkeypatch.setattr(append_file, '_PART_BYTES', 200)
    for begin in (0, 20):
        writer = JsonlWriter(folder / 'metrics.jsonl')
        for step in range(begin, begin + 20):
            writer.write_scalars(step, {'loss': step / 7})
            if step % 7 == 0:
                writer.flush()
        writer.close()
    assert read_metrics(folder / 'metrics.jsonl') == [{'step': step, 'loss': step / 7} for step in range(40)]
    sizes = [len(file.read_bytes()) for file in folder.iterdir()]
    assert len(sizes) > 5 and max(sizes) < 300
    written = []
    monkeypatch.setattr(storage, 'write_atomic', lambda file, content: written.append(file.name))
    writer = JsonlWriter(folder / 'metrics.jsonl')
    writer.write_scalars(40, {'loss': 0.0})
    writer.close()
    assert written == [f'metrics.{len(sizes) - 1:05d}.jsonl']


def test_jsonl_parts_copied_to_a_folder_are_read_and_continued(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(append_file, '_PART_BYTES', 100)
    writer = JsonlWriter(folder / 'metrics.jsonl')
    for step in range(9):
        writer.write_scalars(step, {'loss': 1.0})
    writer.close()
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    local = JsonlWriter(tmp_path / 'metrics.jsonl')
    local.write_scalars(8, {'loss': 2.0})
    local.close()
    assert read_metrics(tmp_path / 'metrics.jsonl') == [
        {'step': step, 'loss': 1.0 + (step == 8)} for step in range(9)]


def test_jsonl_in_an_unreachable_bucket_loses_no_line_and_raises_nothing(folder, monkeypatch):
    def unreachable(file, content):
        raise RuntimeError('no route to host')

    writer = JsonlWriter(folder / 'metrics.jsonl')
    with monkeypatch.context() as patch:
        patch.setattr(append_file, '_PART_BYTES', 100)
        patch.setattr(storage, 'write_atomic', unreachable)
        for step in range(20):
            writer.write_scalars(step, {'loss': 1.0})
            writer.flush()
    assert not (folder / 'metrics.jsonl').exists()
    writer.close()
    assert [record['step'] for record in read_metrics(folder / 'metrics.jsonl')] == [*range(20)]


def test_tensorboard_events_in_a_bucket_are_complete_in_every_object(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(append_file, '_PART_BYTES', 300)
    writer = TensorboardWriter(folder / 'tensorboard', resumed_at=4)
    for step in range(30):
        writer.write_scalars(step, {'loss': step})
    writer.close()
    files = sorted(file.name for file in (folder / 'tensorboard').iterdir())
    assert len(files) > 3
    for name in files:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes((folder / 'tensorboard' / name).read_bytes())
    events = [read_events(tmp_path / name) for name in files]
    assert all(part[0].file_version == 'brain.Event:2' for part in events)
    assert scalars_of(event for part in events for event in part) == [(step, 'loss', step) for step in range(30)]


def test_lock_in_a_bucket_refuses_a_second_run_and_is_free_after_a_dead_one(folder):
    with WorkdirLock(folder, beat_seconds=0.2):
        with pytest.raises(ValueError, match=rf'gs://bucket/run is in use .*process {os.getpid()} on'), \
                WorkdirLock(folder, beat_seconds=0.2):
            pass
        content = (folder / IN_USE_FILE).read_bytes()
    assert not (folder / IN_USE_FILE).exists()
    (folder / IN_USE_FILE).write_bytes(content)  # a killed run leaves this file
    with WorkdirLock(folder, beat_seconds=0.2):
        assert (folder / IN_USE_FILE).read_bytes() != content


@pytest.mark.parametrize('address, message', [
    ('s3://bucket/run', 's3://bucket/run cannot be used: give a folder of this machine, or gs://bucket/folder'),
    ('gs://bucket', 'gs://bucket names no folder in a bucket'), ('gs:///run', 'gs:///run names no folder'),
    ('gs://bucket/run', r"gs://bucket/run needs packages .*: pip install 'evit_jax\[gcs\]'")])
def test_train_and_evaluate_with_an_unusable_address_refuse_before_any_work(address, message, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    for start in (loop.train, loop.evaluate_workdir):
        with pytest.raises(ValueError, match=message) as refusal:
            start(tiny(), address)
        assert '\n' not in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        loop.train(tiny(init_from=address), 'anywhere')


@needs_gcsfs
@pytest.mark.parametrize('address, reason', [
    ('gs://nowhere/run', r'gs://nowhere/run cannot be used \(not found\): check that the bucket exists'),
    ('gs://private/run', r'gs://private/run cannot be used \(the account has no access to private\).*may read and')])
def test_train_in_a_missing_or_forbidden_bucket_names_it_before_any_work(gcs, address, reason, monkeypatch):
    monkeypatch.setattr(loop, '_train', lambda *arguments: pytest.fail('long work'))
    with pytest.raises(ValueError, match=reason) as refusal:
        loop.train(tiny(), address)
    assert '\n' not in str(refusal.value)


@needs_gcsfs
@pytest.mark.slow
def test_damaged_checkpoint_in_a_bucket_is_set_aside_and_the_one_before_used(gcs, caplog):
    config = tiny(checkpoint__every=20)
    metrics = loop.train(config, 'gs://bucket/run')
    assert metrics['top1'] > 0.2
    names = {name.removeprefix('run/').split('/')[0] for name in gcs.objects['bucket']}
    assert names == {'config.json', 'metrics.jsonl', 'tensorboard', 'checkpoints', 'kept.png', 'curves.png'}
    assert loop.evaluate_workdir(config, 'gs://bucket/run')['top1'] == metrics['top1']
    damaged = [name for name in gcs.objects['bucket'] if name.startswith('run/checkpoints/40/state/')]
    for name in damaged:
        gcs.objects['bucket'][name] = (b'', next(gcs.generations))
    _, step = final_parameters('gs://bucket/run', config)
    assert step == 20
    assert 'checkpoint of step 40 cannot be read' in caplog.text
    assert {name.replace('checkpoints', 'unreadable_checkpoints') for name in damaged} <= gcs.objects['bucket'].keys()
    assert newest_step('gs://bucket/run') == 20


@needs_gcsfs
@pytest.mark.slow
def test_train_killed_in_a_bucket_continues_to_the_bit(gcs, tmp_path):
    loop.train(tiny(), tmp_path)
    start = {'cwd': ROOT, 'env': os.environ | gcs.environment, 'stderr': subprocess.PIPE, 'text': True}
    process = subprocess.Popen(command('gs://bucket/run'), **start)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None and \
            not any(name.startswith('run/checkpoints/21/') for name in gcs.objects['bucket']):
        time.sleep(0.01)  # kill while a save is under way
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.communicate()
    before = [*read_metrics('gs://bucket/run/metrics.jsonl')] if 'run/metrics.jsonl' in gcs.objects['bucket'] else []
    done = subprocess.run(command('gs://bucket/run'), **start)
    assert done.returncode == 0, done.stderr
    assert 'taking over' in done.stderr and 'continuing at step' in done.stderr
    expected, actual = final_parameters(tmp_path, tiny()), final_parameters('gs://bucket/run', tiny())
    assert expected[1] == actual[1] == 40
    jax.tree.map(np.testing.assert_array_equal, expected[0], actual[0])
    assert {record['step'] for record in before} <= {
        record['step'] for record in read_metrics('gs://bucket/run/metrics.jsonl')}
    checkpoints = CheckpointManager('gs://bucket/run', keep=3)
    assert checkpoints.latest() == 40
    checkpoints.close()
