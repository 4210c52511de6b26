"""Tests of opening sources by name, and of making sources from arrays, records and folders."""

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import fingerprint
from evit_jax.data.sources import ArraySource, RecordSource, as_source, open_source
from evit_jax.data.sources.folder import ClassFolderSource
from evit_jax.data.sources.generated import GeneratedSource
from tests.helpers.encoded import JPEGS
from tests.helpers.folders import fill
from tests.helpers.toys import SIDE, Numbered, evaluate, joined, train

IMAGES = np.random.default_rng(0).integers(0, 256, (12, SIDE, SIDE, 3), np.uint8)
LABELS = np.arange(12) % 3


class Lazy:
    """A sequence that is no list, as a Grain data source."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {'image': JPEGS['baseline'], 'label': np.int64(LABELS[index]), 'id': f'lazy {index}'}


def write_images(root):
    for index, (image, label) in enumerate(zip(IMAGES, LABELS)):
        path = root / 'abc'[label] / f'{index:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return root


def test_open_source_slice_of_an_unknown_split_raises(tmp_path):
    with pytest.raises(ValueError, match="no split 'dev'"):
        open_source('digits', 'dev[:10%]', path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_open_source_generated_slice_from_the_middle_raises():
    assert len(open_source('generated', 'train[:640]', num_classes=5)) == 640
    with pytest.raises(ValueError, match=r"'train\[640:\]': generated images are cut at the end only"):
        open_source('generated', 'train[640:]', num_classes=5)


@pytest.mark.parametrize('changes, message', [
    ({'name': 'digist'}, "unknown source 'digist': did you mean digits"),
    ({'name': 'cifar'}, 'there are digits, digit_pairs, generated'),
    ({'name': 'custom'}, r'passed as objects.*Give --config.data.source=folder --config.data.path=DIR'),
    ({'split': 'validation'}, "no split 'validation' .there are train, test"),
    ({'num_classes': 1000}, "num_classes=1000, but source 'digits' has 10"),
    ({'name': 'generated', 'image_size': 0}, 'image_size=0'),
])
def test_open_source_invalid_arguments_raise_before_any_build(tmp_path, changes, message):
    arguments = {'name': 'digits', 'split': 'train', 'path': tmp_path, 'image_size': 64, 'num_classes': 10} | changes
    with pytest.raises(ValueError, match=message):
        open_source(**arguments)
    assert not list(tmp_path.iterdir())


def test_as_source_of_a_source_returns_it():
    source = GeneratedSource('train', 8, 3)
    assert as_source(source) is source and as_source(source, source.class_names) is source
    with pytest.raises(ValueError, match='differ from those of the source'):
        as_source(source, ('a', 'b', 'c'))


@pytest.mark.parametrize('kind, expected', [
    ('arrays', ArraySource), ('lists', ArraySource), ('list of records', RecordSource), ('sequence', RecordSource),
    ('folder', ClassFolderSource)])
def test_as_source_of_each_kind_trains_and_evaluates(tmp_path, kind, expected):
    value, names = {
        'arrays': lambda: ((IMAGES, LABELS), ()),
        'lists': lambda: ((IMAGES, LABELS.tolist()), ('x', 'y', 'z')),
        'list of records': lambda: ([{'image': i, 'label': int(n)} for i, n in zip(IMAGES, LABELS)], ()),
        'sequence': lambda: (Lazy(), ('x', 'y', 'z')),
        'folder': lambda: (str(write_images(tmp_path)), ())}[kind]()
    source = as_source(value, names)
    assert isinstance(source, expected) and len(source) == 12 and source.num_classes == 3
    assert source.class_names == (names or (('a', 'b', 'c') if kind == 'folder' else ('0', '1', '2')))
    assert len({source[index]['id'] for index in range(12)}) == 12
    batches = evaluate(source)
    order = np.argsort(LABELS, kind='stable') if kind == 'folder' else np.arange(12)
    np.testing.assert_array_equal(joined(batches), LABELS[order])
    if kind != 'sequence':
        np.testing.assert_array_equal(joined(batches, 'image'), IMAGES[order])
    trained = train(source, epochs=1)
    assert sorted(joined(trained).tolist()) == sorted(LABELS.tolist()) and not joined(trained, 'failed').size


def test_as_source_in_worker_processes_yields_the_same_batches():
    source = as_source((IMAGES, LABELS))
    for ours, theirs in zip(train(source), train(source, num_workers=1), strict=True):
        np.testing.assert_array_equal(ours['image'], theirs['image'])


def test_as_source_of_a_folder_with_class_names_numbers_classes_by_them(tmp_path):
    root = write_images(tmp_path)
    assert as_source(root, ('c', 'b', 'a')).labels.tolist() == [2] * 4 + [1] * 4 + [0] * 4
    with pytest.raises(ValueError, match=r'has 1 class \(c\) that train/ does not have'):
        as_source(root, ('a', 'b'))


def test_as_source_of_a_folder_of_synsets_accepts_readable_class_names(tmp_path):
    fill(tmp_path, {'n01440764': 1, 'n02099601': 2})
    source = as_source(tmp_path, ('golden retriever', 'house', 'tench'))
    assert source.labels.tolist() == [2, 0, 0] and source.class_names == ('golden retriever', 'house', 'tench')
    assert as_source(tmp_path).class_names == ('n01440764', 'n02099601')
    with pytest.raises(ValueError, match=r'has 2 classes \(n01440764, n02099601\) that train/ does not have'):
        as_source(tmp_path, ('tench', 'house'))


def test_as_source_of_val_beside_train_has_the_classes_of_train(tmp_path):
    fill(tmp_path / 'train', {'ape': 1, 'bat': 1, 'cat': 1})
    fill(tmp_path / 'val', {'cat': 2})
    source = as_source(tmp_path / 'val')
    assert source.class_names == ('ape', 'bat', 'cat') and source.labels.tolist() == [2, 2]


def test_as_source_of_a_folder_of_splits_raises_with_the_folder_to_give(tmp_path):
    fill(tmp_path / 'train', {'ape': 1})
    fill(tmp_path / 'val', {'ape': 1})
    with pytest.raises(ValueError, match=r"holds folders of splits \(train, val\).*such as '.*train'"):
        as_source(tmp_path)
    with pytest.raises(ValueError, match=r'one class only \(ape\), and a model needs two'):
        as_source(tmp_path / 'train')
    with pytest.raises(FileNotFoundError, match='no folder'):
        as_source(tmp_path / 'nowhere')


@pytest.mark.parametrize('value', [3, None, {'image': IMAGES, 'label': LABELS}, iter([])])
def test_as_source_of_another_type_raises_with_the_types_to_give(value):
    with pytest.raises(ValueError, match=r'cannot read examples from a .*: give a tuple \(images, labels\)'):
        as_source(value)


def test_as_source_fingerprints_change_with_the_data(tmp_path):
    other = IMAGES.copy()
    other[0, 0, 0, 0] ^= 1
    records = [{'image': image, 'label': int(label)} for image, label in zip(IMAGES, LABELS)]
    values = [(IMAGES, LABELS), (other, LABELS), (IMAGES, LABELS[::-1]), (IMAGES[:9], LABELS[:9]), records, records[1:],
              [*records[:-1], records[0] | {'label': 2}], write_images(tmp_path / 'one')]
    fingerprints = [as_source(value).fingerprint for value in values]
    assert len({*fingerprints, as_source(values[0], 'abc').fingerprint}) == len(values) + 1
    (tmp_path / 'one' / 'a' / '00.png').rename(tmp_path / 'one' / 'a' / 'new.png')
    assert as_source(values[-1]).fingerprint != fingerprints[-1]
    assert fingerprints[:7] == [as_source(value).fingerprint for value in values[:7]]


def test_as_source_of_changed_arrays_is_reported_as_other_data():
    before, now = (fingerprint.describe(as_source(value)) for value in ((IMAGES, LABELS), (255 - IMAGES, LABELS)))
    assert fingerprint.differences(before, before) == []
    assert fingerprint.differences(before, now) == ['12 examples as before, but other ones or in another order']


def test_as_source_numbered_toy_is_a_source():
    source = Numbered(5)
    assert as_source(source) is source
