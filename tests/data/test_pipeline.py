"""Tests of the batches: order, rows of each process, repeats, and the start at any step."""

import itertools

import numpy as np
import pytest

from evit_jax.data import order
from evit_jax.data.transforms.geometry import EvalTransform
from tests.helpers.toys import (
    SIDE,
    Broken,
    Counting,
    Jitter,
    Numbered,
    Plain,
    assert_same,
    evaluate,
    joined,
    labels,
    marked,
    train,
)


def test_train_batches_epoch_contains_each_example_once_in_another_order():
    batches = train(10, batch_size=5, epochs=4)
    epochs = np.array(labels(batches)).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in epochs.tolist()} | {tuple(range(10))}) == 5
    assert batches[0]['image'].dtype == np.uint8 and batches[0]['image'].shape == (5, SIDE, SIDE, 3)
    assert batches[0]['label'].dtype == np.int32 and not batches[0]['failed'].size


def test_train_batches_span_epochs_and_drop_only_the_last_remainder():
    batches = train(10)
    assert len(batches) == order.train_steps(10, 4, 3) == 7
    seen = labels(batches)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))


def test_train_batches_images_match_their_labels():
    for batch in train(10, transform=marked):
        for image, label in zip(batch['image'], batch['label'].tolist()):
            np.testing.assert_array_equal(image[0, 0], Numbered(10)[label]['image'][0, 0])


def test_train_batches_order_depends_on_the_seed():
    assert_same(train(10), train(10))
    assert labels(train(10, seed=8)) != labels(train(10))
    assert labels(train(10, seed=-1)) != labels(train(10))


@pytest.mark.parametrize('repeats', [1, 3])
def test_train_batches_augmentation_differs_by_example_epoch_copy_and_seed(repeats):
    def drawn(seed):
        return [image.tobytes() for image in
                joined(train(6, batch_size=6, epochs=2, seed=seed, transform=marked, repeats=repeats), 'image')]

    assert len({*drawn(0), *drawn(1)}) == 24
    assert drawn(0) == drawn(0)


def test_train_batches_augmentation_is_independent_of_the_position_in_the_batch():
    """The augmentation of an example in an epoch is the same for another batch size."""
    small, large = (train(10, batch_size=size, epochs=1, transform=marked) for size in (2, 10))
    np.testing.assert_array_equal(joined(small, 'image'), joined(large, 'image'))


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('start_step', [0, 1, 2, 5, 7])
def test_train_batches_from_a_step_equal_those_of_an_uninterrupted_run(start_step, repeats):
    assert_same(train(10, start_step, repeats=repeats), train(10, repeats=repeats)[start_step:])


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('size, process_count', [(10, 2), (11, 2), (11, 4), (9, 4)])
@pytest.mark.parametrize('start_step', [0, 3])
def test_train_batches_of_processes_are_contiguous_rows_of_the_global_batch(size, process_count, start_step, repeats):
    for source in (Numbered(size), Broken(size)):
        whole = train(source, start_step, repeats=repeats)
        parts = [train(source, start_step, repeats=repeats, process_index=p, process_count=process_count)
                 for p in range(process_count)]
        assert {len(part) for part in parts} == {len(whole)}
        assert_same([{key: joined(shares, key) for key in whole[0]} for shares in zip(*parts)], whole)


def test_train_batches_repeats_are_consecutive_and_differ():
    seen = labels(train(10, batch_size=6, epochs=1, repeats=3))
    assert seen == np.repeat(seen[::3], 3).tolist() and len(set(seen)) == 2
    images = joined(train(10, batch_size=6, epochs=1, repeats=3, transform=marked), 'image')
    assert len({image.tobytes() for image in images}) == 6


def test_train_batches_epoch_with_3_repeats_visits_a_third_of_the_images():
    seen = np.array(labels(train(600, batch_size=128, epochs=8, repeats=3))).reshape(8, 512)
    assert order.epoch_samples(600, 3) == 512 and order.epoch_samples(600) == 600
    assert order.epoch_samples(1_281_167, 3) == 1_281_024
    assert {len(set(epoch.tolist())) for epoch in seen} == {171}
    assert len(set(seen.ravel().tolist())) > 550  # a different third in each epoch


def test_train_batches_decode_copies_once_per_batch():
    counting = Counting(30)
    train(counting, batch_size=10, epochs=1, repeats=3, transform=marked)
    assert len(counting.read) == 3 * 4  # ten rows: three images, and one shared with the next batch


@pytest.mark.parametrize('size', [1, 4, 7, 8])
@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_eval_batches_contain_each_example_once(size, process_count):
    parts = [evaluate(Numbered(size), process_index=p, process_count=process_count) for p in range(process_count)]
    assert {len(part) for part in parts} == {-(-size // 4)}
    batches = list(itertools.chain(*parts))
    assert all(batch['image'].shape == (4 // process_count, SIDE, SIDE, 3) for batch in batches)
    weight, index, label = (joined(batches, key) for key in ('weight', 'index', 'label'))
    assert weight.dtype == np.float32
    assert sorted(index[weight == 1].tolist()) == list(range(size))
    np.testing.assert_array_equal(label[weight == 1], index[weight == 1])
    assert set(index[weight == 0].tolist()) <= {-1}
    assert set(weight.tolist()) <= {0, 1}


def test_eval_batches_of_processes_keep_the_order_of_the_source():
    parts = [evaluate(Numbered(7), process_index=p, process_count=2) for p in range(2)]
    assert np.concatenate([joined(shares, 'index') for shares in zip(*parts)]).tolist() == [*range(7), -1]


def test_eval_batches_contain_images_and_masks():
    source = Numbered(5, masked=True)
    batches = evaluate(source)
    for i in range(5):
        np.testing.assert_array_equal(batches[i // 4]['image'][i % 4], source[i]['image'])
        np.testing.assert_array_equal(batches[i // 4]['mask'][i % 4], source[i]['mask'] == 255)
    assert batches[0]['mask'].dtype == bool
    assert not batches[1]['mask'][1:].any() and not batches[1]['image'][1:].any()
    assert 'mask' not in evaluate(Numbered(5))[0]


@pytest.mark.parametrize('shape, fits', [((8, 8), True), ((16, 16), True), ((8, 16), False), ((16, 12), False)])
def test_eval_batches_mask_of_other_proportions_is_a_failure(shape, fits):
    class Misfit(Numbered):
        def __getitem__(self, index):
            return super().__getitem__(index) | ({'mask': np.full(shape, 255, np.uint8)} if index == 1 else {})

    batch, = evaluate(Misfit(2, masked=True), transform=EvalTransform(SIDE, crop=None))
    assert batch['weight'].tolist() == [1, int(fits), 0, 0]
    assert fits or f'its mask has {shape[1]} x {shape[0]} pixels, and the image' in batch['failed'][0]


def test_batches_have_the_size_of_the_transform():
    assert train(10, transform=Jitter(12))[0]['image'].shape == (4, 12, 12, 3)
    batch = evaluate(Numbered(5, masked=True), transform=Plain(16))[0]
    assert batch['image'].shape == (4, 16, 16, 3) and batch['mask'].shape == (4, 16, 16)
    np.testing.assert_array_equal(batch['mask'][:, ::2, ::2], evaluate(Numbered(5, masked=True))[0]['mask'])


@pytest.mark.parametrize('changes, message', [
    ({'batch_size': 40}, 'batch_size=40 is larger than the data: 30 samples in 3 epochs of 10 examples'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'process_count': 3}, 'batch_size=4 cannot be split over 3 processes: use a positive multiple of 3'),
    ({'process_index': 2, 'process_count': 2}, r'process_index=2 is outside \[0, 1\]'),
    ({'start_step': 8}, r'start_step=8 is outside \[0, 7\]'),
    ({'start_step': -1}, 'start_step=-1'),
    ({'num_workers': -1}, 'num_workers=-1'),
    ({'epochs': 0}, 'epochs'),
    ({'repeats': 0}, 'repeats=0'),
])
def test_train_batches_invalid_sizes_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        train(10, **changes)


def test_eval_batches_empty_source_raises():
    with pytest.raises(ValueError, match='no examples'):
        evaluate(Numbered(0))
