"""Masks in a folder of their own: found by the path of the image, and left out where one is missing."""

import os

import pytest
from PIL import Image

from evit_jax.data.sources.folder import FolderSource
from evit_jax.inference import dropping
from tests.programs import test_visualize
from tests.programs.test_visualize import SIZE, Few, find

least, checkpoint, trained = test_visualize.least, test_visualize.checkpoint, test_visualize.trained


def test_masks_may_lie_in_a_folder(trained, tmp_path):
    class Named(Few):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {name: example[name] for name in ('image', 'label')} | {'id': f'val/{index}.jpg'}

    (tmp_path / 'val').mkdir()
    for index in range(SIZE - 3):
        Image.fromarray(Few('test')[index]['mask']).save(tmp_path / 'val' / f'{index}.png')
    masked = dropping.MaskedSource(Named('test'), tmp_path)
    assert find(trained, masked, shares=(0.5,)).images == SIZE - 3
    with pytest.raises(FileNotFoundError, match=r'no mask .*val.39\.png'):
        masked[SIZE - 1]
    with pytest.raises(ValueError, match=r'none of 3 images counts: .*no mask'):
        find(trained, dropping.Subset(masked, range(SIZE - 3, SIZE)), shares=(0.5,))


class Torn(Few):
    """The first image cannot be read."""

    def __getitem__(self, index):
        if not index:
            raise OSError('disk error')
        return super().__getitem__(index)


def test_check_masks_first_image_unreadable_takes_the_next(trained):
    dropping.check_masks(Torn('test'))
    assert find(trained, Torn('test'), shares=(0.5,)).images == SIZE - 1
    with pytest.raises(ValueError, match='none of 1 images tried can be used, the last one as: disk error'):
        dropping.check_masks(dropping.Subset(Torn('test'), [0]))


@pytest.mark.parametrize('name', [b'x\ny', b'q\xff', b'a\\nb'])
def test_masked_image_with_an_odd_name_finds_its_mask(tmp_path, name):
    for folder, suffix in ((b'data/val/cat/', b'.jpg'), (b'data/val/dog/', b'.jpg'), (b'masks/val/cat/', b'.png')):
        folder = os.fsencode(tmp_path) + b'/' + folder
        os.makedirs(folder)
        with open(folder + name + suffix, 'wb') as file:
            file.write(b'the file ' + suffix)
    masked = dropping.MaskedSource(FolderSource(tmp_path / 'data', 'val'), tmp_path / 'masks')
    assert masked[0]['mask'] == b'the file .png' and len(masked[0]['id'].splitlines()) == 1
    with pytest.raises(FileNotFoundError, match='there is no mask') as caught:
        masked[1]
    assert str(caught.value).isprintable()
