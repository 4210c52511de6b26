"""Checksums of a checkpoint's files: every change of a file is detected, also those that Orbax would not notice."""

import json
import shutil

import numpy as np
import pytest

from evit_jax.checkpoints import checksums

FILES = {'first': b'', 'meta/metadata': b'{"next_step": 3}', 'state/d/chunk': bytes(range(256)) * 40,
         'state/manifest': b'm' * 99}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, '_CHUNK', 1000)  # less than the largest file
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    checksums.write(tmp_path)
    return tmp_path


def test_check_of_intact_files_returns_true_and_without_checksums_false(folder):
    assert checksums.check(folder) is True
    (folder / checksums.FILE).unlink()
    assert checksums.check(folder) is False


def test_check_with_a_flipped_bit_names_the_file(folder):
    rng = np.random.default_rng(0)
    for name, data in FILES.items():
        for position in {0, len(data) - 1, *rng.integers(max(len(data), 1), size=9).tolist()} if data else ():
            broken = bytearray(data)
            broken[position] ^= 1 << rng.integers(8)
            (folder / name).write_bytes(broken)
            with pytest.raises(ValueError, match=f'^{name} holds other bytes than were written'):
                checksums.check(folder)
        (folder / name).write_bytes(data)
    assert checksums.check(folder)


def test_check_of_a_truncated_longer_or_missing_file_names_it(folder):
    file = folder / 'state/manifest'
    for size in (0, 98, 100):
        file.write_bytes(b'm' * size)
        with pytest.raises(ValueError, match=f'^state/manifest has {size} bytes, 99 were written'):
            checksums.check(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r'^state/manifest is missing'):
        checksums.check(folder)
    shutil.rmtree(folder / 'state')
    with pytest.raises(ValueError, match=r'^state/d/chunk is missing'):
        checksums.check(folder)


def test_check_of_reordered_bytes_names_the_file(folder):
    chunk = folder / 'state/d/chunk'
    chunk.write_bytes(chunk.read_bytes()[::-1])
    with pytest.raises(ValueError, match='state/d/chunk holds other bytes'):
        checksums.check(folder)


def test_check_with_damaged_checksums_raises(folder):
    file = folder / checksums.FILE
    content = file.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            broken = bytearray(content)
            broken[position] ^= 1 << bit
            if bytes(broken).split() != content.split():  # a change of white space alone is no damage
                file.write_bytes(broken)
                with pytest.raises(ValueError, match=r'is damaged|is missing|bytes'):
                    checksums.check(folder)
    for cut in (b'', content[:-3], b'[]', b'{"first": 7}', json.dumps({'first': [0]}).encode()):
        file.write_bytes(cut)
        with pytest.raises(ValueError, match=r'checksums.json is damaged'):
            checksums.check(folder)


def test_write_leaves_out_the_files_of_the_commit(folder):
    (folder / '_CHECKPOINT_METADATA').write_text('{}')
    (folder / 'commit_success.txt').write_text('yes')
    assert checksums.check(folder)
    checksums.write(folder)
    assert json.loads((folder / checksums.FILE).read_text()).keys() == FILES.keys()
