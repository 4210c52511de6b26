import logging
import os
import pathlib
import pickle

import numpy as np
import pytest

from evit_jax.data.sources import crc32c, tfrecord
from tests.helpers import prepared


def records(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.bytes(int(size)) for size in rng.integers(0, 400, count)]


@pytest.fixture
def shards(tmp_path):
    """Three files of records, one of them empty, and the records of each."""
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


@pytest.mark.parametrize('size', [0, 1, 3, 4, 9, 127, 128, 129, 256, 257, 1000, 5000])
def test_checksum_is_that_of_the_definition(size):
    data = np.random.default_rng(size).bytes(size)
    assert crc32c.crc_of(data) == prepared.crc32c(data)
    assert int.from_bytes(prepared.checksum(data), 'little') == crc32c.mask(crc32c.crc_of(data))


def test_checksum_of_the_published_example():
    assert crc32c.crc_of(b'123456789') == 0xE3069283
    assert crc32c.crc_of_rows(np.zeros((2, 32), np.uint8)).tolist() == [0x8A9136AA] * 2


def test_random_access_gives_what_reading_through_gives(shards):
    files, parts = shards
    flat = [record for part in parts for record in part]
    assert [record for file in files for record in tfrecord.read_all(file)] == flat
    source = opened(shards)
    assert len(source) == len(flat)
    order = np.random.default_rng(0).permutation(len(flat)).tolist()
    assert [source[i] for i in order] == [flat[i] for i in order]
    for outside in (-1, len(flat)):
        with pytest.raises(IndexError):
            source[outside]


def test_pickled_reader_opens_files_of_its_own(shards):
    source = opened(shards)
    want = [source[i] for i in range(len(source))]
    again = pickle.loads(pickle.dumps(source))
    os.rename(shards[0][0], shards[0][0] + '.away')
    assert source[0] == want[0]  # open already
    assert again[7] == want[7]
    with pytest.raises(FileNotFoundError):
        again[0]


def test_remote_files_read_as_local_ones_do(shards):
    local, remote = tfrecord.LocalFile(shards[0][0]), tfrecord.RemoteFile(shards[0][0])
    assert local.size == remote.size == os.path.getsize(shards[0][0])
    for at, count in ((0, 12), (100, 50), (5, 5), (local.size - 3, 10)):
        assert local.read(at, count) == remote.read(at, count)
    local.close()
    remote.close()


def test_index_is_made_once(shards, monkeypatch):
    want = [*opened(shards)]
    monkeypatch.setattr(tfrecord, 'scan', None)
    assert [*opened(shards)] == want


@pytest.mark.parametrize('change', ['longer file', 'other name', 'damaged index', 'empty index', 'index of something'])
def test_stale_index_is_made_anew(shards, change, tmp_path):
    files, parts = shards
    opened(shards)
    (kept,) = tmp_path.glob('.evit_jax*')
    if change == 'longer file':
        parts[0] = records(9, seed=5)
        prepared.write_tfrecord(files[0], parts[0])
    elif change == 'other name':
        files[0], files[2] = files[2] + '-b', files[0] + '-b'  # what was first is last
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


def test_index_goes_to_the_cache_where_the_data_cannot_be_written(shards, tmp_path, monkeypatch, caplog):
    files, _ = shards
    save = tfrecord.index_cache._save

    def read_only(place, index):
        if str(place).startswith(os.path.dirname(files[0]) + '/.'):
            raise PermissionError(13, 'Permission denied')
        save(place, index)

    monkeypatch.setattr(tfrecord.index_cache, '_save', read_only)
    want = [*opened(shards, cache=str(tmp_path / 'cache'))]
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    with caplog.at_level(logging.WARNING):
        assert [*opened(shards)] == want
    assert 'will be built again' in caplog.text
    monkeypatch.setattr(tfrecord, 'scan', None)
    assert [*opened(shards, cache=str(tmp_path / 'cache'))] == want


def test_file_cut_off_anywhere_is_named_with_what_is_whole(shards):
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


def test_damaged_length_is_named(shards):
    at = 16 + len(shards[1][0][0])
    damage(shards[0][0], at + 2)
    with pytest.raises(ValueError, match=f'the length of record 1 at byte {at} has a wrong checksum .1 records before'):
        opened(shards)


def test_file_of_something_else_is_no_tfrecord(shards):
    pathlib.Path(shards[0][2]).write_bytes(bytes(5000))
    with pytest.raises(ValueError, match='no TFRecord file'):
        opened(shards)


def test_damaged_data_are_found_on_reading_through(shards):
    damage(shards[0][0], 16 + len(shards[1][0][0]) + 12)
    with pytest.raises(ValueError, match=r'the data of record 1 at byte .* have a wrong checksum'):
        list(tfrecord.read_all(shards[0][0]))


def test_file_changed_under_the_reader_is_said(shards):
    source = opened(shards)
    prepared.write_tfrecord(shards[0][0], records(7, seed=8))
    with pytest.raises(ValueError, match=r'changed since it was indexed.*remove the index \(.*npz\) and start again'):
        list(source)
