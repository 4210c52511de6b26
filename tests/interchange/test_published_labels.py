"""Published label maps are found by the id of an image, converted to label maps, and refused if they are invalid."""

import pathlib
import zipfile

import numpy as np
import pytest

from evit_jax.data.token_labels.label_maps import LabelMaps
from evit_jax.interchange import published_labels
from tests.helpers import label_program
from tests.helpers.label_program import SIZES, open_train
from tests.helpers.torch_files import plain, storage, tensor

digits, label, run = label_program.digits, label_program.label, label_program.run


def write_published(path, value, index):
    """Writes a file as torch.save(torch.stack([value, index]).half(), path) does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    both = np.stack([value, index]).astype(np.float16)
    size, stride = both.shape, tuple(step // 2 for step in both.strides)
    halves = storage(count=both.size, kind=b'ctorch\nHalfStorage\n')
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('x/data.pkl', b'\x80\x02' + tensor(halves, 0, size, stride) + b'.')
        archive.writestr('x/data/0', both.tobytes())
    return path


def test_label_published_files_become_label_maps(tmp_path, run):
    folder, out, want = tmp_path / 'published', tmp_path / 'maps', {}
    rng = np.random.default_rng(0)
    for number in range(SIZES['train']):
        example = open_train()[number]['id']
        want[example] = rng.normal(5, 3, (5, 6, 6)).astype(np.float16), np.argsort(rng.random((10, 6, 6)), 0)[:5]
        write_published(published_labels.label_map_path(folder, example), *want[example])
    assert run(f'--published={folder}', f'--out={out}') == (0, '')
    maps = LabelMaps(out)
    assert maps.metadata.grid == (6, 6) and maps.metadata.annotator == 'published files'
    for example, (value, index) in want.items():
        np.testing.assert_array_equal(maps[example].value, value)
        np.testing.assert_array_equal(maps[example].index, index)
    path = published_labels.label_map_path(folder, open_train()[20]['id'])
    write_published(path, np.zeros((5, 3, 3)), np.zeros((5, 3, 3)))
    code, errors = run(f'--published={folder}', f'--out={tmp_path / "others"}')
    assert code == 2 and 'holds a map of [5, 3, 3], the one of the first image is of [5, 6, 6]' in errors


def test_label_missing_or_damaged_published_files_leave_images_without_a_map(tmp_path, run, caplog):
    folder, bad = tmp_path / 'published', {0: None, 4: None, 9: b'no zip'}  # 0 is among the files checked first
    for number in range(SIZES['train']):
        path = published_labels.label_map_path(folder, open_train()[number]['id'])
        write_published(path, np.ones((5, 3, 3)), np.zeros((5, 3, 3)))
        if number in bad:
            path.unlink() if bad[number] is None else path.write_bytes(bad[number])
    assert run(f'--published={folder}', f'--out={tmp_path / "maps"}')[0] == 0
    maps = LabelMaps(tmp_path / 'maps')
    assert [number for number in range(SIZES['train']) if open_train()[number]['id'] not in maps] == [*bad]
    assert '3 of 40 examples have no label map' in caplog.text


@pytest.mark.parametrize('example, path', [
    ('train/n01440764/n01440764_10026.JPEG', 'n01440764/n01440764_10026.pt'),
    ('n01440764_10026.JPEG', 'n01440764/n01440764_10026.pt'), ('val/a b/c.d.jpg', 'a b/c.pt')])
def test_label_map_path_has_the_layout_of_the_reference(example, path):
    assert published_labels.label_map_path('/labels', example) == pathlib.Path('/labels', path)


def test_label_map_path_names_with_dots_are_distinguished(tmp_path):
    (tmp_path / 'a').mkdir()
    for name in ('img.pt', 'img.1.pt', 'img.2.pt'):
        (tmp_path / 'a' / name).write_bytes(b'')
    paths = [published_labels.label_map_path(tmp_path, f'train/a/img{part}.png') for part in ('', '.1', '.2', '.3')]
    assert [path.name for path in paths] == ['img.pt', 'img.1.pt', 'img.2.pt', 'img.pt']


@pytest.mark.parametrize('value, index, message', [
    (np.zeros((5, 3)), np.zeros((5, 3)), r'a tensor \[2, 5, 3\]'),
    (np.zeros((5, 3, 3)), np.full((5, 3, 3), 10), 'names class 10: the data have 10 classes'),
    (np.zeros((5, 3, 3)), np.full((5, 3, 3), 0.5), 'names class 0.5')])
def test_read_label_map_other_shape_or_class_is_refused(tmp_path, value, index, message):
    with pytest.raises(ValueError, match=message):
        published_labels.read_label_map(write_published(tmp_path / 'x.pt', value, index), 10)


def test_read_label_map_not_a_tensor_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as archive:
        archive.writestr('x/data.pkl', b'\x80\x02' + plain({'a': 1}) + b'.')
    with pytest.raises(ValueError, match='holds a dict: a label map is'):
        published_labels.read_label_map(tmp_path / 'x.pt', 10)
