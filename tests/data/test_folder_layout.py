"""Folders of images with the faults that people bring: each is refused with the way out, or a warning names it."""

import shutil

import pytest
import tensorflow_datasets as tfds

from evit_jax.data.sources import open_source
from evit_jax.data.sources.folder import FolderSource
from evit_jax.data.transforms import decode
from evit_jax.inference.images import find_images
from tests.helpers import prepared
from tests.helpers.folders import fill, ids

HELD_OUT = 'auto'  # the split to evaluate on, see `splits.resolve`


@pytest.fixture
def pets(tmp_path):
    fill(tmp_path / 'train', {'cat': 20, 'dog': 10})
    fill(tmp_path / 'val', {'cat': 2, 'dog': 1})
    return tmp_path


def deeper(folder, name='images'):
    """Moves what is in a folder one level down."""
    (folder.parent / 'moved').mkdir()
    folder.rename(folder.parent / 'moved' / name)
    (folder.parent / 'moved').rename(folder)


@pytest.mark.parametrize('split', ['train', HELD_OUT, 'val', 'train[:50%]'])
def test_open_source_one_class_is_refused_for_training_and_evaluation(pets, split):
    shutil.rmtree(pets / 'train' / 'dog')
    with pytest.raises(ValueError, match=r'train. has one class only \(cat\), and a model needs two or more: images'):
        open_source('folder', split, path=pets)


@pytest.mark.parametrize('levels', [1, 3])
def test_open_source_classes_below_the_only_folder_are_pointed_out(pets, levels):
    for _ in range(levels):
        deeper(pets / 'train')
    with pytest.raises(ValueError, match=r'one class only \(images\).*level below looks like the classes: 2 folders '
                                         r"\(cat, dog\) in '.*train/images(/images)*': move them up into '.*train'"):
        open_source('folder', 'train', path=pets)


def test_open_source_generated_and_tfds_with_one_class_are_refused(tmp_path):
    with pytest.raises(ValueError, match="source 'generated' has 1 class, and a model needs two or more"):
        open_source('generated', 'train', num_classes=1)
    features = prepared.FEATURES | {'label': tfds.features.ClassLabel(names=['ant'])}
    prepared.write_data_set(tmp_path / 'ants' / '1.0.0', {'train': [[b'']], 'test': [[b'']]}, features)
    with pytest.raises(ValueError, match="source 'tfds' has 1 class"):
        open_source('tfds', 'train', path=tmp_path, dataset='ants')


@pytest.mark.parametrize('inner, way_out', [
    ('train', r'This is the folder of a split: give --config.data.path=\S*pets$'),
    ('val', r'This is the folder of a split: give --config.data.path=\S*pets$'),
    ('..', r'1 folder \(pets\) in it with train/: give --config.data.path=\S*pets$')])
def test_open_source_path_beside_the_data_set_names_the_right_path(tmp_path, inner, way_out):
    fill(tmp_path / 'pets' / 'train', {'cat': 2, 'dog': 2})
    fill(tmp_path / 'pets' / 'val', {'cat': 2, 'dog': 2})
    with pytest.raises(FileNotFoundError, match=way_out):
        open_source('folder', 'train', path=(tmp_path / 'pets' / inner).resolve())


def test_open_source_classes_without_train_are_recognised(tmp_path):
    fill(tmp_path, {'cat': 1, 'dog': 1})
    with pytest.raises(FileNotFoundError, match=r'2 folders \(cat, dog\) in it with images: .* move them into .*/train'
                                                '; or make a new folder with a link named train'):
        open_source('folder', 'train', path=tmp_path)
    new = tmp_path / 'new'
    new.mkdir()
    shutil.rmtree(tmp_path / 'cat'), fill(tmp_path / 'old', {'cat': 20, 'dog': 20})
    (new / 'train').symlink_to(tmp_path / 'old')  # the way out
    assert open_source('folder', 'train', path=new).class_names == ('cat', 'dog')


def test_open_source_train_in_capitals_is_to_be_renamed(pets):
    (pets / 'train').rename(pets / 'Train')
    shutil.rmtree(pets / 'val')
    with pytest.raises(FileNotFoundError, match="Rename 'Train' to train"):
        open_source('folder', 'train', path=pets)


def test_open_source_splits_below_train_are_no_classes(pets):
    (pets / 'home').mkdir()
    for split in ('train', 'val'):
        (pets / split).rename(pets / 'home' / split)
    (pets / 'home').rename(pets / 'train')
    with pytest.raises(ValueError, match=r'holds folders of splits \(train, val\).*give --config.data.path=\S*/train'):
        open_source('folder', 'train', path=pets)


@pytest.mark.parametrize('names, hint', [
    (('images', 'masks'), r': images are expected as \S*/train/<class>'),
    (('JPEGImages', 'Ground_Truth', 'labels'), ': images are expected as'),
    (('images/a', 'images/b', 'labels/a'), r"level below looks like the classes: 2 folders \(a, b\) in '\S*images'")])
def test_open_source_images_and_their_annotations_are_no_classes(tmp_path, names, hint):
    fill(tmp_path / 'train', dict.fromkeys(names, 2))
    with pytest.raises(ValueError, match=rf"images and of annotations \(.*\) and not of classes.*{hint}.*if these are "
                                         'the classes, rename'):
        open_source('folder', 'train[:100%]', path=tmp_path)


def test_open_source_classes_with_one_name_of_annotations_are_opened(tmp_path):
    fill(tmp_path / 'train', {'hat': 2, 'mask': 2})
    assert open_source('folder', 'train[:100%]', path=tmp_path).class_names == ('hat', 'mask')


@pytest.mark.parametrize('split', ['train', 'val'])
def test_open_source_hidden_class_folder_with_images_is_warned_of(pets, caplog, split):
    fill(pets / split, {'.net': 1, '.empty': 0})
    open_source('folder', 'train', path=pets)
    assert f"{split}': left out, since the name begins with a dot: 1 folder (.net) with images" in caplog.text


@pytest.mark.parametrize('levels', [1, 2])
def test_folder_source_val_one_folder_too_deep_is_pointed_out(pets, levels):
    for _ in range(levels):
        deeper(pets / 'val')
    with pytest.raises(ValueError, match=r"1 class \(images\) that train/ does not have.*the classes are in "
                                         r"'.*val/images(/images)?': move its folders up"):
        FolderSource(pets, 'val')


@pytest.mark.parametrize('make, error', [
    (lambda train: (train / '.cat').mkdir(), 'holds no folders of classes'),
    (lambda train: [(train / name).mkdir() for name in ('cat', 'dog')], "class folder .*cat' holds no images"),
    (lambda train: (fill(train, {'cat': 1, 'dog': 1}), (train / 'owl').symlink_to('nowhere')),
     r'1 link \(owl\) that lead nowhere')])
def test_open_source_hidden_empty_or_lost_class_folders_are_refused(tmp_path, make, error):
    (tmp_path / 'train').mkdir()
    make(tmp_path / 'train')
    with pytest.raises(ValueError, match=error):
        open_source('folder', 'train', path=tmp_path)


def test_folders_that_archives_add_are_left_out(pets):
    fill(pets / 'train' / '__MACOSX', {'cat': 1})
    fill(pets / 'train' / 'cat' / '@eaDir', {'000.jpg': 1})
    assert FolderSource(pets, 'train').class_names == ('cat', 'dog') and len(ids(pets)) == 30


def test_val_with_some_of_the_classes_is_evaluated_and_logged(pets, caplog):
    shutil.rmtree(pets / 'val' / 'cat')
    source = open_source('folder', 'val', path=pets)
    assert source.labels.tolist() == [1] and source.num_classes == 2
    assert "split 'val' has no image of 1 class (cat); there are 2 classes" in caplog.text


def test_open_source_one_image_a_class_without_val_is_refused(tmp_path):
    fill(tmp_path / 'train', {f'{label:02d}': 1 for label in range(20)})
    with pytest.raises(ValueError, match=r'no val/, so a tenth of train/ is held out.*all images of 2 classes '
                                         r'\(18, 19\).*train_split=.train\[:100%\]'):
        open_source('folder', 'train', path=tmp_path)
    assert len(open_source('folder', 'train[:100%]', path=tmp_path)) == 20
    fill(tmp_path / 'val', {'00': 1})
    assert len(open_source('folder', 'train', path=tmp_path)) == 20


def test_few_single_images_stay_in_training(tmp_path):
    fill(tmp_path / 'train', {'ape': 40, 'bat': 1, 'cat': 1, 'dog': 20})
    held_out = ids(tmp_path, HELD_OUT)
    assert len(held_out) == 6 and not [name for name in held_out if 'bat' in name or 'cat' in name]


def test_images_too_few_for_a_tenth_name_the_way_out(tmp_path):
    fill(tmp_path / 'train', {'cat': 2, 'dog': 2})
    with pytest.raises(ValueError, match=r'no val/, so a tenth of train/ is held out .*holds no examples.*make val/'):
        open_source('folder', HELD_OUT, path=tmp_path)


def test_folder_to_evaluate_on_with_another_name_is_named(pets, caplog):
    (pets / 'val').rename(pets / 'valid')
    assert len(open_source('folder', HELD_OUT, path=pets)) == 3
    assert 'a tenth of train/ is held out; not used: 1 folder (valid)' in caplog.text


@pytest.mark.parametrize('name', ['valid', 'dev'])
def test_folder_source_split_with_another_folder_name_is_to_be_renamed(pets, name):
    (pets / 'val').rename(pets / name)
    with pytest.raises(ValueError, match=rf"no split '{name}' \(there are train\): rename the folder '\S*{name}' to "
                                         'validation or val'):
        open_source('folder', f'{name}[:50%]', path=pets)


def test_folder_source_auto_leaves_out_a_test_folder_without_classes(pets, caplog):
    (pets / 'val').rename(pets / 'test')
    assert FolderSource(pets, HELD_OUT).split == 'test'
    shutil.rmtree(pets / 'test')
    fill(pets, {'test': 4})
    assert [FolderSource(pets, split).split for split in ('train', HELD_OUT)] == ['train[:90%]', 'train[90%:]']
    assert 'a tenth of train/ is held out; not used: 1 folder (test)' in caplog.text
    with pytest.raises(ValueError, match='outside of any class'):
        FolderSource(pets, 'test')
    fill(pets / 'val', {'cat': 1})
    assert FolderSource(pets, HELD_OUT).split == 'val'


@pytest.mark.parametrize('name', ['test', 'val'])
def test_folder_source_file_with_the_name_of_a_split_is_no_split(pets, caplog, name):
    (pets / 'val').rename(pets / 'validation')
    (pets / name).write_text('')
    assert FolderSource(pets, HELD_OUT).split == 'validation'
    shutil.rmtree(pets / 'validation')
    assert FolderSource(pets, HELD_OUT).split == 'train[90%:]'
    assert f"{name}' is a file and no folder of images: it is not used" in caplog.text


def test_folder_source_link_of_a_split_that_leads_nowhere_is_refused(pets):
    shutil.rmtree(pets / 'val')
    (pets / 'val').symlink_to('nowhere')
    with pytest.raises(FileNotFoundError, match=r"no folder '.*val'"):
        FolderSource(pets, HELD_OUT)


def test_open_source_without_train_has_the_classes_of_all_splits(tmp_path):
    fill(tmp_path / 'val', {'ape': 2, 'cat': 1})
    fill(tmp_path / 'test', {'ape': 1, 'bat': 1, 'cat': 1})
    for split, labels in (('val', [0, 0, 2]), ('test', [0, 1, 2])):
        source = open_source('folder', split, path=tmp_path)
        assert source.class_names == ('ape', 'bat', 'cat') and source.labels.tolist() == labels


def test_classes_below_folders_of_batches_are_warned_of(tmp_path, caplog):
    for batch in ('one', 'two'):
        fill(tmp_path / 'train' / batch, {'cat': 10, 'dog': 10})
    FolderSource(tmp_path, 'train')
    assert 'no class folder (one, two) holds images itself, and all of them hold 2 folders (cat, dog)' in caplog.text


@pytest.mark.parametrize('inner, classes', [('', '2 classes (cat, dog)'), ('dog', '1 class (dog)')])
def test_val_that_is_a_link_to_train_is_warned_of(pets, caplog, inner, classes):
    shutil.rmtree(pets / 'val' / inner)
    (pets / 'val' / inner).symlink_to(pets / 'train' / inner)
    open_source('folder', 'val', path=pets)
    assert f'are links to train/ or the reverse, their images are trained on, too: {classes}' in caplog.text


def test_two_classes_that_are_one_folder_are_refused(pets):
    (pets / 'train' / 'owl').symlink_to(pets / 'train' / 'cat')
    with pytest.raises(ValueError, match="the classes 'cat' and 'owl' are one folder: one is a link, remove it"):
        open_source('folder', 'train', path=pets)


def test_packed_files_beside_the_classes_are_warned_of(pets, caplog):
    (pets / 'train' / 'owl.tar').write_text('')
    open_source('folder', 'train', path=pets)
    assert '1 packed file (owl.tar): what is in them is not used' in caplog.text


def test_image_suffixes_are_the_same_for_training_and_prediction(tmp_path, caplog):
    for suffix in decode.SUFFIXES:
        fill(tmp_path / 'train', {'cat': 2, 'dog': 2}, suffix=suffix.upper())
    assert {'.bmp', '.gif', '.tif', '.tiff'} < {*decode.SUFFIXES}
    names = ids(tmp_path, 'train[:100%]')
    assert len(names) == 4 * len(decode.SUFFIXES)
    assert sorted(f'{tmp_path}/{name}' for name in names) == sorted(find_images([str(tmp_path)]))
    assert 'are no images' not in caplog.text
