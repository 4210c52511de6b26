import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from evit_jax.data import tfrecord, to_array_record
from evit_jax.data.tfds_source import TfdsSource
from evit_jax.data.to_array_record import convert_to_array_record
from tests import prepared

ROOT = pathlib.Path(__file__).parents[1]
RECORDS = [prepared.example(image=b'x' * number, label=number % 3, file_name=b'%d' % number) for number in range(40)]


@pytest.fixture
def source(tmp_path):
    folder = prepared.write_data_set(tmp_path / 'insects' / '2.0.0', {
        'train': [RECORDS[:9], RECORDS[9:20], RECORDS[20:30]], 'test': [RECORDS[30:]]})
    (folder / 'LICENSE').write_text('free')
    return folder


def all_of(folder):
    sources = [TfdsSource(folder, f'{split}[:100%]') for split in ('train', 'test')]
    return [source[i] for source in sources for i in range(len(source))]


def run(*arguments):
    return subprocess.run([sys.executable, '-m', 'evit_jax.convert_data', *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, check=False)


def test_copy_holds_the_same_examples_names_and_files(source, tmp_path):
    target = tmp_path / 'to' / 'insects'
    convert_to_array_record(source, target)
    assert all_of(target) == all_of(source)
    assert TfdsSource(target, 'test').class_names == TfdsSource(source, 'test').class_names
    assert (target / 'LICENSE').read_text() == 'free'
    names = {path.name for path in target.iterdir()}
    assert {name.replace('array_record', 'tfrecord') for name in names} == {
        path.name for path in source.iterdir() if not path.name.startswith('.')}
    before, after = (json.loads((folder / 'dataset_info.json').read_text()) for folder in (source, target))
    assert after == before | {'fileFormat': 'array_record'}
    assert [path.name for path in target.parent.iterdir()] == ['insects']


@pytest.mark.parametrize('spoilt', ['cut off', 'too few records'])  # as a crash of the system may leave a file
def test_interrupted_conversion_goes_on_behind_the_last_whole_file(source, tmp_path, monkeypatch, spoilt):
    target, read, seen = tmp_path / 'copy', tfrecord.read_all, []

    def interrupted(path, count):
        for number, record in enumerate(read(path, count)):
            seen.append(path)
            if '00002-of' in path and number == 3 and len(seen) == 24:
                raise KeyboardInterrupt
            yield record

    monkeypatch.setattr(tfrecord, 'read_all', interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert_to_array_record(source, target)
    assert not target.exists()
    first, second = sorted((tmp_path / 'copy.incomplete').glob('*0000?-of-00003'))
    second.write_bytes(first.read_bytes()[:100 if spoilt == 'cut off' else None])
    seen.clear()
    convert_to_array_record(source, target)
    assert len(seen) == 11 + 10 + 10
    assert all_of(target) == all_of(source)
    assert not [path for path in target.iterdir() if path.suffix == '.part']


def test_damaged_record_is_not_copied(source, tmp_path):
    (file,) = source.glob('*train*-00001-of-00003')
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r'00001-of-00003.: the data of record 0 at byte 0 have a wrong checksum'):
        convert_to_array_record(source, tmp_path / 'copy')
    assert not (tmp_path / 'copy').exists()


def test_nothing_is_written_over(source, tmp_path):
    (tmp_path / 'copy').mkdir()
    with pytest.raises(FileExistsError, match=r'copy. is there already'):
        convert_to_array_record(source, tmp_path / 'copy')


def test_buckets_are_not_written(source):
    with pytest.raises(ValueError, match=r'gs://bucket/x.: array_record files are written to mounted folders only'):
        convert_to_array_record(source, 'gs://bucket/x')


def test_work_of_another_conversion_is_not_continued(source, tmp_path):
    other = shutil.copytree(source, tmp_path / 'other' / '3.0.0')
    info = json.loads((other / 'dataset_info.json').read_text())
    (other / 'dataset_info.json').write_text(json.dumps(info | {'version': '3.0.0'}))
    (next(other.glob('*test*'))).write_bytes(b'cut')
    with pytest.raises(ValueError, match='is cut off'):
        convert_to_array_record(other, tmp_path / 'copy')
    with pytest.raises(ValueError, match='was begun from other data'):
        convert_to_array_record(source, tmp_path / 'copy')


def test_two_conversions_to_one_place_do_not_mix(source, tmp_path, monkeypatch):
    convert, refused = to_array_record._convert, []

    def meanwhile(shards, work):
        with pytest.raises(ValueError, match='another conversion is at work') as error:
            convert_to_array_record(source, tmp_path / 'copy')
        refused.append(error)
        convert(shards, work)

    monkeypatch.setattr(to_array_record, '_convert', meanwhile)
    convert_to_array_record(source, tmp_path / 'copy')
    assert refused and all_of(tmp_path / 'copy') == all_of(source)


def test_room_is_looked_at_before_the_work(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r'has 0.0 GB of room, and 0.0 GB are needed'):
        convert_to_array_record(source, tmp_path / 'copy')


def test_command_converts_and_says_what_is_wrong_in_one_line(source, tmp_path):
    done = run(source, tmp_path / 'copy')
    assert done.returncode == 0, done.stderr
    assert '40 records in 4 files' in done.stderr
    assert all_of(tmp_path / 'copy') == all_of(source)
    for arguments, message in [((source, tmp_path / 'copy'), 'is there already'),
                               ((tmp_path / 'copy', tmp_path / 'again'), 'stored as array_record, not as tfrecord')]:
        failed = run(*arguments)
        assert failed.returncode == 2
        assert failed.stderr.startswith('error: ') and failed.stderr.count('\n') == 1 and message in failed.stderr
    assert run(source).returncode == 2


def test_killed_conversion_leaves_nothing_under_its_name(source, tmp_path):
    program = f"""
import os, signal
from evit_jax.data import tfrecord, to_array_record
read = tfrecord.read_all
def read_all(path, count):
    return os.kill(os.getpid(), signal.SIGKILL) if '00002-of' in path else read(path, count)
tfrecord.read_all = read_all
to_array_record.convert_to_array_record({os.fspath(source)!r}, {os.fspath(tmp_path / 'copy')!r})
"""
    killed = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-500:]
    assert not (tmp_path / 'copy').exists() and (tmp_path / 'copy.incomplete').exists()
    convert_to_array_record(source, tmp_path / 'copy')
    assert all_of(tmp_path / 'copy') == all_of(source)
