"""Atomic writes, and the check that a folder can be written."""

import errno
import os
import subprocess
import sys
from unittest import mock

import pytest

from evit_jax.runtime import storage


def test_write_atomic_on_a_full_disk_keeps_the_old_file_and_no_temporary_file(tmp_path):
    file = storage.as_path(tmp_path) / 'config.json'
    storage.write_atomic(file, b'old')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(file), 'replace', mock.Mock(side_effect=OSError(errno.ENOSPC, 'No space left')))
        with pytest.raises(OSError, match='No space left'):
            storage.write_atomic(file, b'new')
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('config.json', b'old')]


def test_open_atomic_shows_the_old_file_until_the_body_ends(tmp_path):
    file = tmp_path / 'index.npz'
    storage.write_atomic(file, b'old')
    with storage.open_atomic(file) as writer:
        writer.write(b'new')
        assert file.read_bytes() == b'old'
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('index.npz', b'new')]


def test_open_atomic_with_an_error_in_the_body_keeps_the_old_file(tmp_path):
    file = tmp_path / 'index.npz'
    storage.write_atomic(file, b'old')
    with pytest.raises(KeyboardInterrupt), storage.open_atomic(file):
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [('index.npz', b'old')]


def test_new_folder_appears_at_the_end_of_the_body_and_never_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), storage.new_folder(tmp_path / 'a' / 'b') as folder:
        (folder / 'file').touch()
        raise KeyboardInterrupt
    assert [*(tmp_path / 'a').iterdir()] == []
    with storage.new_folder(tmp_path / 'a' / 'b') as folder:
        (folder / 'file').touch()
        assert not (tmp_path / 'a' / 'b').exists()
    assert [path.name for path in (tmp_path / 'a').rglob('*')] == ['b', 'file']


KILLED = """
import os, pathlib, signal, sys
from evit_jax.runtime import storage
with storage.new_folder(sys.argv[1]) as folder:
    (pathlib.Path(folder) / 'file').touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_new_folder_removes_the_unfinished_folder_of_a_killed_process(tmp_path):
    folder = tmp_path / 'a'
    subprocess.run([sys.executable, '-c', KILLED, folder], check=False)
    assert any(path.is_dir() for path in tmp_path.glob('a.unfinished-*'))
    (tmp_path / 'a.unfinished-by-hand').mkdir()
    with storage.new_folder(folder):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {'a', 'a.unfinished-by-hand'}


def test_new_folder_keeps_the_unfinished_folder_of_a_running_process(tmp_path):
    with storage.new_folder(tmp_path / 'a') as first:
        (first / 'file').touch()
        with pytest.raises(KeyboardInterrupt), storage.new_folder(tmp_path / 'a'):
            raise KeyboardInterrupt
        assert (first / 'file').exists()
    assert [path.name for path in tmp_path.rglob('*')] == ['a', 'file']


def test_new_folder_that_another_program_wrote_in_the_meantime_is_refused(tmp_path):
    with (pytest.raises(ValueError, match='a was written by another program in the meantime'),
          storage.new_folder(tmp_path / 'a')):
        (tmp_path / 'a').mkdir()
        (tmp_path / 'a' / 'file').touch()
    assert [path.name for path in tmp_path.rglob('*')] == ['a', 'file']


def test_new_folder_on_a_disk_with_too_little_space_is_refused_and_leaves_nothing(tmp_path):
    with (pytest.raises(ValueError, match=r'b cannot be written \(.* MB free, 1000000000000.0 MB to write\): free'),
          storage.new_folder(tmp_path / 'b', 10**18)):
        pytest.fail('the body runs')
    assert [*tmp_path.iterdir()] == []


def test_make_writable_creates_the_folder_and_leaves_nothing_in_it(tmp_path):
    storage.make_writable(tmp_path / 'a' / 'b', '--out=b', 'give another')
    assert [path.name for path in tmp_path.rglob('*')] == ['a', 'b']


@pytest.mark.parametrize('kind', ['file', pytest.param('read-only', marks=pytest.mark.skipif(
    os.geteuid() == 0, reason='root may write anywhere'))])
def test_make_writable_of_a_file_or_read_only_folder_is_refused_with_the_way_out(tmp_path, kind):
    folder = tmp_path / 'a'
    folder.touch() if kind == 'file' else folder.mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r'^--out=b cannot be written \(.+\): give another$'):
        storage.make_writable(folder, '--out=b', 'give another')
