"""Tests of cached lists of files: used if the times of the folders report changes, rebuilt otherwise."""

import logging
import os
import shutil
import time

import numpy as np
import pytest

from evit_jax.data.sources import folder, index_cache
from evit_jax.data.sources.folder import FolderSource
from tests.helpers.folders import change_status, fill, ids, settle

KEPT = '.evit_jax_folder_train.npz'


@pytest.fixture
def pets(tmp_path):
    fill(tmp_path / 'train', {'cat': 3, 'dog': 2})
    fill(tmp_path / 'val', {'cat': 1})
    settle(tmp_path)
    return tmp_path


def set_times(root, *times):
    """Sets the times of a split folder and its class folders to these values in turn."""
    for number, path in enumerate((root, *sorted(root.iterdir()))):
        os.utime(path, (times[number % len(times)],) * 2)


def forget_inode_times(monkeypatch):
    """Imitates a file system without inode times."""
    monkeypatch.setattr(folder, '_times', lambda status: (status.st_mtime_ns, 0))


@pytest.mark.parametrize('times', [(1.7e9,), (1.6e9, 1.7e9, 1.7e9), (0,), (0, 1, 2), (315_532_800, 1.7e9, 1.6e9),
                                   (1.7e9, 4e9, 1.6e9), (-5, 1.7e9, 1.6e9)])
def test_folder_source_unreliable_times_are_listed_again(pets, monkeypatch, times):
    forget_inode_times(monkeypatch)
    set_times(pets / 'train', *times)
    assert len(ids(pets)) == 5
    assert not (pets / KEPT).exists()  # it would never be used
    (pets / 'train' / 'cat' / 'new.jpg').write_text('')
    set_times(pets / 'train', *times)
    assert 'train/cat/new.jpg' in ids(pets)


def test_folder_source_class_folders_of_equal_time_are_listed_again(pets):
    fill(pets / 'train', {'cat/a': 1, 'cat/b': 1})
    settle(pets)
    set_times(pets / 'train', 1.7e9)
    set_times(pets / 'train' / 'cat' / 'a', 1.6e9)
    assert len(ids(pets)) == 7 and not (pets / KEPT).exists()


@pytest.mark.parametrize('kind, trusted', [('ext4', True), ('squashfs', False)])
def test_folder_source_class_folder_on_another_file_system_is_cached_by_its_type(pets, monkeypatch, kind,
                                                                                           trusted):
    change_status(monkeypatch, lambda path: path.endswith('/dog'), st_dev=os.makedev(259, 7))
    (pets / 'mounts').write_text(f'21 1 259:7 / /dogs rw - {kind} dogs rw\n')
    monkeypatch.setattr(index_cache, '_MOUNTS', pets / 'mounts')
    ids(pets)
    assert (pets / KEPT).exists() == trusted


def test_folder_source_new_file_with_reset_time_is_listed(pets):
    assert len(ids(pets)) == 5 and (pets / KEPT).exists()
    cat = pets / 'train' / 'cat'
    before = cat.stat().st_mtime_ns
    (cat / 'new.jpg').write_text('')
    os.utime(cat, ns=(before, before))
    assert 'train/cat/new.jpg' in ids(pets)


@pytest.mark.parametrize('change', ['added', 'removed', 'renamed'])
def test_folder_source_changed_classes_with_equal_times_are_listed_again(pets, monkeypatch, change):
    forget_inode_times(monkeypatch)
    fill(pets / 'train', {'owl': 2})
    set_times(pets / 'train', 1.5e9, 1.6e9, 1.7e9, 1.8e9 - 1e8)
    ids(pets)
    assert (pets / KEPT).exists()
    if change == 'added':
        fill(pets / 'train', {'ant': 1})
    elif change == 'removed':
        shutil.rmtree(pets / 'train' / 'owl')
    else:
        (pets / 'train' / 'owl').rename(pets / 'train' / 'pig')
    os.utime(pets / 'train', (1.5e9, 1.5e9))
    assert ids(pets) == sorted(f'train/{path.relative_to(pets / "train")}' for path in (pets / 'train').rglob('*.jpg'))


def test_folder_source_cached_list_is_logged_with_its_path_and_time(pets, caplog):
    with caplog.at_level(logging.INFO):
        ids(pets)
        assert 'read from' not in caplog.text
        ids(pets)
    year = time.strftime('%Y-')
    assert f"index folder_train of '{pets}': read from '{pets}/{KEPT}', built {year}" in caplog.text
    assert 'remove that file to build it again' in caplog.text


def test_folder_source_cached_list_of_other_suffixes_is_rebuilt(pets, monkeypatch):
    monkeypatch.setattr(folder, 'SUFFIXES', ('.jpg',))
    ids(pets)
    monkeypatch.undo()
    listed, make = [], folder._list
    monkeypatch.setattr(folder, '_list', lambda *arguments: listed.append(1) or make(*arguments))
    ids(pets)
    assert listed


def test_folder_source_cached_list_of_an_older_version_is_rebuilt(pets):
    np.savez(pets / KEPT, name=np.array([b'cat/000.jpg']), kind=np.zeros(1, np.int32))
    assert len(FolderSource(pets, 'train')) == 5


def test_load_or_build_index_that_is_not_current_is_not_stored(tmp_path, caplog):
    def build():
        return {'value': np.array(3)}

    with caplog.at_level(logging.INFO):
        for _ in range(2):
            index = index_cache.load_or_build('test', data_folder=str(tmp_path), cache=str(tmp_path / 'cache'),
                                              build=build, is_current=lambda index: False)
            assert index['value'] == 3
    assert not list(tmp_path.iterdir()) and 'not stored and built again next time' in caplog.text


@pytest.mark.parametrize('kind, trusted', [('ext4', True), ('fuseblk', True), ('fuse.gcsfuse', False), ('fuse', False),
                                           ('squashfs', False), ('overlay', True)])
def test_folder_source_on_fuse_mounts_and_disk_images_is_not_cached(pets, monkeypatch, kind, trusted):
    device = os.stat(pets).st_dev
    number = f'{os.major(device)}:{os.minor(device)}'
    (pets / 'mounts').write_text('21 1 259:99 / /other rw - fuse other rw\n'
                                 f'36 35 {number} / /a\\040b rw shared:1 - {kind} /dev/x rw\n')
    monkeypatch.setattr(index_cache, '_MOUNTS', pets / 'mounts')
    ids(pets)
    assert (pets / KEPT).exists() == trusted
    monkeypatch.setattr(index_cache, '_MOUNTS', pets / 'nowhere')
    assert index_cache.reports_changes(pets)
