import logging
import os
import pathlib
import pickle

import numpy as np
import pytest
from tensorboardX.record_writer import masked_crc32c

from evit_jax.data.sources import tfrecord
from tests.helpers import prepared


def records(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(size)) for size in rng.integers(0, 400, count)]


@pytest.fixture
def shards(tmp_path):
    """Writes three files of records, one of them empty; returns their paths and the records of each."""
    parts = [records(7), [], records(5, seed=1)]
    files = []
    for number, part in enumerate(parts):
        files.append(str(tmp_path / f'some-train.tfrecord-{number:05d}-of-00003'))
        prepared.write_tfrecord(files[-1], part)
    return files, parts


def opened(shards, **changes):
    files, parts = shards
    return tfrecord.open_records(files, [len(part) for part in parts], **{'name': 'train'} | changes)


def damage(file, offset, value=None):
    with open(file, 'r+b') as opened_file:
        opened_file.seek(offset)
        byte = opened_file.read(1)[0]
        opened_file.seek(offset)
        opened_file.write(bytes([byte ^ 255 if value is None else value]))


@pytest.mark.parametrize('size', [0, 1, 8, 9, 500])
def test_masked_crc32c_of_the_library_equals_the_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert masked_crc32c(data) == int.from_bytes(prepared.checksum(data), 'little')


def test_crc32c_of_the_published_example():
    assert prepared.crc32c(b'123456789') == 0xE3069283


def test_tfrecords_random_access_returns_the_records_of_all_files(shards):
    files, parts = shards
    flat = [record for part in parts for record in part]
    assert [record for file in files for record in prepared.read_tfrecord(pathlib.Path(file))] == flat
    source = opened(shards)
    assert len(source) == len(flat)
    order = np.random.default_rng(0).permutation(len(flat)).tolist()
    assert [source[i] for i in order] == [flat[i] for i in order]
    for outside in (-1, len(flat)):
        with pytest.raises(IndexError):
            source[outside]


def test_tfrecords_pickled_opens_its_own_files(shards):
    source = opened(shards)
    want = [source[i] for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    os.rename(shards[0][0], shards[0][0] + '.away')
    assert source[0] == want[0]  # the copy must not use this open file
    assert again[7] == want[7]
    with pytest.raises(FileNotFoundError):
        again[0]


def test_remote_file_reads_the_same_as_local_file(shards):
    local, remote = tfrecord.LocalFile(shards[0][0]), tfrecord.RemoteFile(shards[0][0])
    assert local.size == remote.size == os.path.getsize(shards[0][0])
    for at, count in ((0, 12), (100, 50), (5, 5), (local.size - 3, 10)):
        assert local.read(at, count) == remote.read(at, count)
    local.close()
    remote.close()


def test_open_records_twice_builds_the_index_once(shards, monkeypatch):
    want = [*opened(shards)]
    monkeypatch.setattr(tfrecord, 'scan', None)
    assert [*opened(shards)] == want


@pytest.mark.parametrize('change', ['longer file', 'other name', 'damaged index', 'empty index', 'index of something'])
def test_open_records_stale_index_is_rebuilt(shards, change, tmp_path):
    files, parts = shards
    opened(shards)
    (kept,) = tmp_path.glob('.evit_jax*')
    if change == 'longer file':
        parts[0] = records(9, seed=5)
        prepared.write_tfrecord(files[0], parts[0])
    elif change == 'other name':
        files[0], files[2] = files[2] + '-b', files[0] + '-b'  # renamed files, in reverse order
        for new, part in ((files[0], parts[2]), (files[2], parts[0])):
            prepared.write_tfrecord(new, part)
        parts.reverse()
    elif change == 'damaged index':
        kept.write_bytes(kept.read_bytes()[:-300])
    elif change == 'empty index':
        kept.write_bytes(b'')
    else:
        np.savez(kept, name=np.zeros(3))
    assert [*opened(shards)] == [record for part in parts for record in part]


def test_open_records_read_only_data_stores_the_index_in_the_cache(shards, tmp_path, monkeypatch, caplog):
    files, _ = shards
    save = tfrecord.index_cache._save

    def read_only(path, index):
        if str(path).startswith(os.path.dirname(files[0]) + '/.'):
            raise PermissionError(13, 'Permission denied')
        save(path, index)

    monkeypatch.setattr(tfrecord.index_cache, '_save', read_only)
    want = [*opened(shards, cache=str(tmp_path / 'cache'))]
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    with caplog.at_level(logging.WARNING):
        assert [*opened(shards)] == want
    assert 'will be built again' in caplog.text
    monkeypatch.setattr(tfrecord, 'scan', None)
    assert [*opened(shards, cache=str(tmp_path / 'cache'))] == want


def test_open_records_truncated_file_raises_with_the_number_of_whole_records(shards):
    files, parts = shards
    whole = pathlib.Path(files[0]).read_bytes()
    ends = np.cumsum([16 + len(record) for record in parts[0]])
    for size in range(1, len(whole), 5):
        pathlib.Path(files[0]).write_bytes(whole[:size])
        kept = int((ends <= size).sum())
        begun = int(ends[kept - 1]) if kept else 0
        cause = 'ends too early' if size in ends else f'is cut off: record {kept} begins at byte {begun} '
        with pytest.raises(ValueError, match=f'{files[0]}.*{cause}.*[:;] {kept} records are whole, .* counts 7'):
            opened(shards)


def test_open_records_damaged_length_raises_with_its_record(shards):
    at = 16 + len(shards[1][0][0])
    damage(shards[0][0], at + 2)
    with pytest.raises(ValueError, match=f'the length of record 1 at byte {at} has a wrong checksum .1 records before'):
        opened(shards)


def test_open_records_other_file_type_raises(shards):
    pathlib.Path(shards[0][2]).write_bytes(bytes(5000))
    with pytest.raises(ValueError, match='no TFRecord file'):
        opened(shards)


def test_tfrecords_file_changed_after_indexing_raises(shards):
    source = opened(shards)
    prepared.write_tfrecord(shards[0][0], records(7, seed=8))
    with pytest.raises(ValueError, match=r'changed since it was indexed.*remove the index \(.*npz\) and start again'):
        list(source)
