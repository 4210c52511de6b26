"""Fingerprints of sources: equal for equal examples, other where the examples or their order are others."""

import shutil

import pytest

from evit_jax.data import fingerprint
from evit_jax.data.sources.folder import FolderSource
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.data.sources.tfds_source import TfdsSource
from tests.helpers import prepared, toys
from tests.helpers.folders import fill, settle


@pytest.fixture
def pets(tmp_path):
    fill(tmp_path / 'train', {'cat': 20, 'ape': 10, 'dog': 3})
    fill(tmp_path / 'val', {'cat': 2, 'dog': 1})
    return tmp_path


def of_folder(path, split='train'):
    settle(path)
    return FolderSource(path, split).fingerprint


def test_fingerprint_of_a_folder_is_that_of_a_copy_elsewhere(pets, tmp_path_factory):
    copy = tmp_path_factory.mktemp('copy') / 'pets'
    shutil.copytree(pets, copy)
    assert of_folder(pets) == of_folder(copy) != of_folder(pets, 'val')


@pytest.mark.parametrize('change', [
    lambda train: fill(train, {'cat': 21}), lambda train: (train / 'dog' / '001.jpg').unlink(),
    lambda train: (train / 'dog' / '001.jpg').rename(train / 'dog' / '1.jpg'),
    lambda train: (train / 'dog' / '001.jpg').rename(train / 'cat' / '900.jpg')],
    ids=['added', 'removed', 'renamed', 'moved'])
def test_fingerprint_of_a_folder_changes_with_its_files(pets, change):
    before = of_folder(pets)
    change(pets / 'train')
    assert of_folder(pets) != before


def test_fingerprint_of_a_folder_tells_slices_and_orders_of_splits_apart(pets):
    splits = ('train', 'train[:50%]', 'train[50%:]', 'train+val', 'val+train', 'val')
    assert len({of_folder(pets, split) for split in splits}) == len(splits)


def test_fingerprint_of_tfds_is_the_same_in_both_formats_and_other_for_other_records(tmp_path):
    def made(name, version, labels):
        records = [[prepared.example(image=b'jpeg', label=label) for label in labels]]
        prepared.write_data_set(tmp_path / name / 'insects' / version, {'train': records, 'test': records})
        return TfdsSource(tmp_path / name, 'train', 'insects').fingerprint

    first = made('first', '2.0.0', [0, 1, 2, 0])
    prepared.as_array_record(tmp_path / 'first' / 'insects' / '2.0.0',
                             tmp_path / 'array' / 'insects' / '2.0.0')
    assert TfdsSource(tmp_path / 'array', 'train', 'insects').fingerprint == first
    assert len({first, made('fewer', '2.0.0', [0, 1, 2]), made('newer', '2.1.0', [0, 1, 2, 0]),
                TfdsSource(tmp_path / 'first', 'train[:2]', 'insects').fingerprint,
                TfdsSource(tmp_path / 'first', 'test', 'insects').fingerprint}) == 5


def test_fingerprint_of_generated_images_is_that_of_their_parameters():
    sources = [GeneratedSource('train', 8, 3), GeneratedSource('test', 8, 3), GeneratedSource('train', 8, 4),
               GeneratedSource('train', 8, 3, seed=1), GeneratedSource('train', 8, 3, size=64)]
    assert len({source.fingerprint for source in sources}) == len(sources)
    assert sources[0].fingerprint == GeneratedSource('train', 8, 3).fingerprint


def test_fingerprint_of_a_source_without_one_is_that_of_its_number_and_classes():
    assert fingerprint.fingerprint(toys.Numbered(4)) == fingerprint.fingerprint(toys.Numbered(4))
    assert fingerprint.fingerprint(toys.Numbered(4)) != fingerprint.fingerprint(toys.Numbered(5))


@pytest.mark.parametrize(('change', 'said'), [
    ({}, []), ({'examples': 1600}, ['1,401 examples then, 1,600 now']),
    ({'split': 'test', 'fingerprint': 'b'}, ["split 'val' then, 'test' now"]),
    ({'fingerprint': 'b'}, ['1,401 examples as before, but other ones or in another order'])])
def test_differences_name_what_changed_with_both_values(change, said):
    before = {'examples': 1401, 'split': 'val', 'fingerprint': 'a'}
    assert fingerprint.differences(before, before | change) == said
