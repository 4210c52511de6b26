import collections
import logging
import os
import pickle
import shutil

import pytest

from evit_jax.data.sources import folder, open_source
from evit_jax.data.sources.folder import FolderSource
from tests.helpers.folders import examples, fill, hide_inodes, ids, settle


@pytest.fixture
def pets(tmp_path):
    fill(tmp_path / 'train', {'cat': 20, 'ape': 10, 'dog': 3})
    fill(tmp_path / 'val', {'cat': 2, 'dog': 1})
    settle(tmp_path)
    return tmp_path


def test_folder_source_sorts_classes_and_files(pets):
    source = open_source('folder', 'train', path=pets, num_classes=3)
    assert source.class_names == ('ape', 'cat', 'dog') and source.num_classes == 3 and source.image_size is None
    assert len(source) == 33
    for i in range(33):
        example = source[i]
        _, name, file = example['id'].split('/')
        assert example['label'] == source.class_names.index(name)
        assert example['image'] == f'{name} {int(file[:3])}'.encode()
    assert ids(pets) == sorted(ids(pets))
    with pytest.raises(IndexError):
        source[33]


def test_folder_source_val_has_the_labels_of_train(pets):
    assert [(example['label'], example['id']) for example in examples(pets, 'auto')] == [
        (1, 'val/cat/000.jpg'), (1, 'val/cat/001.jpg'), (2, 'val/dog/000.jpg')]
    assert ids(pets, 'val') == ids(pets, 'auto')


def test_folder_source_explicit_split_opens_its_folder(pets):
    fill(pets / 'test', {'ape': 4})
    opened = {split: FolderSource(pets, split) for split in ('auto', 'val', 'test', 'test[:50%]', 'val+test')}
    assert {split: (source.split, len(source)) for split, source in opened.items()} == {
        'auto': ('val', 3), 'val': ('val', 3), 'test': ('test', 4), 'test[:50%]': ('test[:50%]', 2),
        'val+test': ('val+test', 7)}
    assert {example['id'] for example in examples(pets, 'test')} == {f'test/ape/00{i}.jpg' for i in range(4)}


@pytest.mark.parametrize('name', ['val', 'validation', 'test'])
def test_folder_source_auto_accepts_three_folder_names(pets, name):
    (pets / 'val').rename(pets / name)
    assert len(ids(pets, 'auto')) == len(ids(pets, name)) == 3 and len(ids(pets)) == 33


def test_folder_source_reads_suffixes_in_any_case_and_skips_hidden_files(pets):
    ape = pets / 'train' / 'ape'
    shutil.rmtree(ape)
    images = ['a.JPG', 'b.jpeg', 'below/deep/e.jpg', 'c.Png', 'd.webp', 'h.gif', 'j.BMP', 'k.tif', 'l.tiff']
    for name in (*images, '.f.jpg', '.hidden/g.jpg', 'i.txt'):
        (ape / name).parent.mkdir(parents=True, exist_ok=True)
        (ape / name).write_text(name)
    assert [name[10:] for name in ids(pets) if '/ape/' in name] == images


def test_folder_source_follows_links_and_raises_on_reading_a_broken_one(pets, tmp_path_factory):
    elsewhere = fill(tmp_path_factory.mktemp('elsewhere'), {'owls': 2})
    (pets / 'train' / 'owl').symlink_to(elsewhere / 'owls')
    (pets / 'train' / 'dog' / 'link.jpg').symlink_to(elsewhere / 'owls' / '001.jpg')
    found = {example['id']: example['image'] for example in examples(pets)}
    assert found['train/owl/000.jpg'] == b'owls 0'
    assert found['train/dog/link.jpg'] == b'owls 1'
    (pets / 'train' / 'dog' / 'lost.jpg').symlink_to(elsewhere / 'nothing')
    assert len(FolderSource(pets, 'train')) == len(found) + 1
    with pytest.raises(FileNotFoundError, match=r'dog/lost\.jpg'):
        examples(pets)


def test_folder_source_slices_cover_the_split_once_with_classes_in_proportion(tmp_path):
    fill(tmp_path / 'train', {'ape': 40, 'cat': 20, 'dog': 10})
    whole = ids(tmp_path, 'train[:100%]')
    for cut in ('90%', '50%', '33%', '7', '69'):
        first, second = ids(tmp_path, f'train[:{cut}]'), ids(tmp_path, f'train[{cut}:]')
        assert sorted(first + second) == whole and first == sorted(first)
    counts = collections.Counter(name.split('/')[1] for name in ids(tmp_path, 'train[90%:]'))
    assert counts == {'ape': 4, 'cat': 2, 'dog': 1}
    held_out = [name for name in ids(tmp_path, 'train[90%:]') if 'ape' in name]
    assert held_out != [f'train/ape/{number:03d}.jpg' for number in range(36, 40)]  # not just the last names


def test_folder_source_without_val_holds_out_a_tenth_of_train(tmp_path):
    fill(tmp_path / 'train', {'ape': 40, 'cat': 20})
    assert ids(tmp_path, 'train') == ids(tmp_path, 'train[:90%]')
    assert ids(tmp_path, 'auto') == ids(tmp_path, 'train[90%:]')
    assert len(ids(tmp_path, 'auto')) == 6


def test_folder_source_added_image_moves_few_others_between_slices(tmp_path):
    fill(tmp_path / 'train', {'ape': 100})
    before = set(ids(tmp_path, 'auto'))
    fill(tmp_path / 'train', {'ape': 101})
    assert len(before ^ set(ids(tmp_path, 'auto'))) <= 2


def test_folder_source_slices_of_two_splits_are_concatenated(pets):
    both = ids(pets, 'val[1:]+train[:100%]')
    assert both == ids(pets, 'val[1:]') + ids(pets)
    assert set(both[:2]) < set(ids(pets, 'val'))


def test_folder_source_opened_twice_lists_files_once(pets, monkeypatch):
    want = examples(pets)
    monkeypatch.setattr(folder, '_list', None)
    assert examples(pets) == want
    assert [path.name for path in pets.iterdir() if path.name.startswith('.')] == ['.evit_jax_folder_train.npz']


@pytest.mark.parametrize('change', ['file added', 'file below added', 'file removed', 'file renamed', 'class added',
                                    'class renamed'])
def test_folder_source_changed_names_are_listed_again(pets, change):
    fill(pets / 'train', {'ape/below': 1})
    settle(pets)
    before = ids(pets)
    ape = pets / 'train' / 'ape'
    if change == 'file added':
        (ape / 'new.jpg').write_text('')
    elif change == 'file below added':
        (ape / 'below' / 'new.jpg').write_text('')
    elif change == 'file removed':
        (ape / '003.jpg').unlink()
    elif change == 'file renamed':
        (ape / '003.jpg').rename(ape / 'new.jpg')
    elif change == 'class added':
        fill(pets / 'train', {'bat': 1})
    else:
        ape.rename(pets / 'train' / 'emu')
    after = ids(pets)
    assert after != before
    shutil.rmtree(pets / 'val')
    assert after == sorted(f'train/{path.relative_to(pets / "train")}' for path in (pets / 'train').rglob('*.jpg'))


def test_folder_source_recently_changed_folders_are_listed_again(pets, monkeypatch):
    (pets / 'train' / 'cat' / 'new.jpg').write_text('')
    listed, make = [], folder._list
    monkeypatch.setattr(folder, '_list', lambda *arguments: listed.append(1) or make(*arguments))
    ids(pets), ids(pets)
    assert len(listed) == 2


def test_folder_source_without_inodes_reads_subfolders_and_raises_on_loops(pets, monkeypatch):
    fill(pets / 'train', {'ape/below': 1})
    hide_inodes(monkeypatch)
    assert 'train/ape/below/000.jpg' in ids(pets)
    (pets / 'train' / 'cat' / 'loop').symlink_to(pets / 'train' / 'cat')
    with pytest.raises(ValueError, match='link to a folder that it lies in'):
        FolderSource(pets, 'train')


def test_folder_source_skips_a_link_to_a_pipe(pets):
    os.mkfifo(pets / 'pipe')
    (pets / 'train' / 'ape' / 'pipe.jpg').symlink_to(pets / 'pipe')
    assert len(FolderSource(pets, 'train')) == 33


def test_folder_source_pickled_reads_the_same_examples(pets):
    source = pickle.loads(pickle.dumps(FolderSource(pets, 'train[:50%]')))
    assert [source[i] for i in range(len(source))] == examples(pets, 'train[:50%]')


def test_folder_source_names_in_any_encoding_are_printable(pets):
    odd = os.path.join(os.fsencode(pets), b'train', b'cat', b'caf\xe9.jpg')
    with open(odd, 'wb') as file:
        file.write(b'coffee')
    (example,) = [example for example in examples(pets) if example['image'] == b'coffee']
    assert example['id'] == 'train/cat/caf\\xe9.jpg'


def test_folder_source_logs_the_number_of_other_files(pets, caplog):
    (pets / 'train' / 'cat' / 'notes.txt').write_text('')
    with caplog.at_level(logging.INFO):
        ids(pets)
    assert '1 files are not images and are skipped: 1 .txt' in caplog.text


def remake(path, name):
    shutil.rmtree(path)
    path.mkdir() if name == 'folder' else path.write_text('')


@pytest.mark.parametrize('spoil, error, message', [
    (shutil.rmtree, FileNotFoundError, 'there is no folder'),
    (lambda path: (path / 'train').rename(path / 'images') and shutil.rmtree(path / 'val'), FileNotFoundError,
     r'has no folder train/, but 1 entry \(images\): images are expected as train/<class>/\*.jpg'),
    (lambda path: remake(path / 'train', 'folder'), ValueError, 'holds no folders of classes'),
    (lambda path: remake(path / 'train', 'file'), NotADirectoryError, 'train. is a file, but a folder is expected'),
    (lambda path: remake(path, 'file'), NotADirectoryError, 'is a file, but a folder is expected'),
    (lambda path: (path / 'train' / 'bat').mkdir(), ValueError, "class folder .*bat' holds no images"),
    (lambda path: (path / 'train' / 'x.JPG').write_text(''), ValueError, r'1 image \(x.JPG\) outside of any class'),
    (lambda path: (path / 'train' / 'cat' / 'loop').symlink_to(path / 'train'), ValueError, 'link to a folder that it'),
])
def test_folder_source_other_layouts_raise(pets, spoil, error, message):
    spoil(pets)
    with pytest.raises(error, match=message):
        FolderSource(pets, 'train')


def test_folder_source_unknown_classes_of_val_raise(pets):
    fill(pets / 'val', {'yak': 1, 'zebra': 1})
    with pytest.raises(ValueError, match=r"val' has 2 classes \(yak, zebra\) that train/ does not have"):
        FolderSource(pets, 'auto')


@pytest.mark.parametrize('split, message', [
    ('dev', "no split 'dev' .there are train, val"), ('test', "no split 'test' .there are train, val"),
    ('train[:x]', 'Unrecognized split format'),
    ('val[:0]', 'holds no examples .there are 3 in')])
def test_folder_source_unknown_split_raises(pets, split, message):
    with pytest.raises(ValueError, match=message):
        FolderSource(pets, split)


def test_open_source_other_number_of_classes_raises(pets):
    with pytest.raises(ValueError, match="num_classes=1000, but source 'folder' has 3"):
        open_source('folder', 'train', path=pets, num_classes=1000)


def test_folder_source_bucket_raises():
    with pytest.raises(ValueError, match='mount the bucket'):
        FolderSource('gs://bucket/images', 'train')
