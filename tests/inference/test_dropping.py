"""The dropping experiment: accuracy when patches are removed, masks in a folder, unreadable images."""

import os

import numpy as np
import pytest
from PIL import Image

from evit_jax.data.sources.folder import FolderSource
from evit_jax.inference import dropping
from evit_jax.inference.held_out import spread
from evit_jax.inference.model import VisionModel
from tests.helpers import few
from tests.helpers.few import SIZE, Few, drop

small_run, checkpoint, loaded = few.small_run, few.checkpoint, few.loaded


@pytest.fixture(scope='module')
def result(loaded):
    return drop(loaded)


class Scratched(Few):
    """The same images with other pixels in the patches on the object."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        on_object = dropping.object_patches(example['mask'][None] > 127, 16).reshape(4, 4).repeat(4, 0).repeat(4, 1)
        return example | {'image': np.where(on_object[..., None], 255 - example['image'], example['image'])}


class FirstUnreadable(Few):
    def __getitem__(self, index):
        if not index:
            raise OSError('disk error')
        return super().__getitem__(index)


def test_drop_patches_share_zero_has_the_accuracy_of_the_dense_model(loaded, result):
    images = [Few('test')[index]['image'] for index in range(SIZE)]
    predictions = VisionModel(loaded, batch_size=8).with_plan(keep_rate=1.0).predict(images)
    accuracy = np.mean([prediction.top[0].label == index % 3 for index, prediction in enumerate(predictions)])
    assert result.shares == (0, 0.25, 0.5, 0.75) and result.images == SIZE
    assert {values[0] for values in result.accuracy.values()} == {accuracy}
    assert len({tuple(values) for values in result.accuracy.values()}) > 2


def test_drop_patches_depends_on_the_seed_and_not_on_the_batch_size(loaded, result):
    again, other = drop(loaded, batch_size=8), drop(loaded, seed=1)
    for order, values in result.accuracy.items():
        np.testing.assert_allclose(again.accuracy[order], values)
        assert np.array_equal(values, other.accuracy[order]) or 'attended' not in order
    assert any(not np.array_equal(values, other.accuracy[order]) for order, values in result.accuracy.items())


def test_drop_patches_pixels_of_dropped_patches_change_nothing(loaded, result):
    scratched = drop(loaded, Scratched('test'))
    first, last = dropping.ORDERS[:2]
    assert result.on_object == scratched.on_object < 0.75
    assert result.accuracy[first][-1] == scratched.accuracy[first][-1]  # every patch on the object is dropped
    assert any(result.accuracy[last][number] != scratched.accuracy[last][number] for number in range(4))


def test_orders_start_with_the_patches_in_their_name():
    rng = np.random.default_rng(0)
    on_object, attention, draws = rng.random((5, 16)) < 0.3, rng.random((5, 16)), rng.random((5, 16))
    orders = dropping._orders(on_object, attention, draws)
    assert tuple(orders) == dropping.ORDERS
    for ids in orders.values():
        np.testing.assert_array_equal(np.sort(ids, 1), np.tile(range(16), (5, 1)))
    first, last, _, least, most = orders.values()
    for row, count in enumerate(on_object.sum(1)):
        assert on_object[row][first[row, :count]].all() and on_object[row][last[row, 16 - count:]].all()
        assert (np.diff(attention[row][least[row]]) > 0).all() and (np.diff(attention[row][most[row]]) < 0).all()


def test_drop_patches_images_without_an_object_are_left_out(loaded):
    class Half(Few):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example | {'mask': example['mask'] * np.uint8(index % 2)}

    assert drop(loaded, Half('test'), shares=(0,)).images == SIZE // 2


def test_masked_source_reads_masks_from_a_folder_and_a_missing_mask_leaves_its_image_out(loaded, tmp_path):
    class Named(Few):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return {name: example[name] for name in ('image', 'label')} | {'id': f'val/{index}.jpg'}

    (tmp_path / 'val').mkdir()
    for index in range(SIZE - 3):
        Image.fromarray(Few('test')[index]['mask']).save(tmp_path / 'val' / f'{index}.png')
    masked = dropping.MaskedSource(Named('test'), tmp_path)
    assert drop(loaded, masked, shares=(0.5,)).images == SIZE - 3
    with pytest.raises(FileNotFoundError, match=r'no mask .*val.39\.png'):
        masked[SIZE - 1]
    with pytest.raises(ValueError, match=r'none of 3 images counts: .*no mask'):
        drop(loaded, dropping.Subset(masked, range(SIZE - 3, SIZE)), shares=(0.5,))


def test_check_masks_first_image_unreadable_tries_the_next(loaded):
    dropping.check_masks(FirstUnreadable('test'))
    assert drop(loaded, FirstUnreadable('test'), shares=(0.5,)).images == SIZE - 1
    with pytest.raises(ValueError, match='none of 1 images tried can be used, the last one as: disk error'):
        dropping.check_masks(dropping.Subset(FirstUnreadable('test'), [0]))


@pytest.mark.parametrize('name', [b'x\ny', b'q\xff', b'a\\nb'])
def test_masked_source_image_with_an_odd_name_finds_its_mask(tmp_path, name):
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


def test_spread_takes_indices_from_end_to_end():
    assert spread(10, 3) == [0, 4, 9] and spread(2, 5) == [0, 1] and spread(7, 1) == [0]
    with pytest.raises(ValueError, match='no images'):
        spread(0, 3)
