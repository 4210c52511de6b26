import functools
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from evit_jax.data import pipeline, sources, transforms
from evit_jax.data.decode import decode

SIDE = 8


class Numbered:
    """Example i has label i and an image of noise that belongs to i."""
    num_classes, class_names, image_size = 1000, (), SIDE

    def __init__(self, size, masked=False):
        self.size, self.masked = size, masked

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if not 0 <= index < self.size:
            raise IndexError(index)
        image = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        mask = {'mask': np.where(image[..., 0] > 99, np.uint8(255), np.uint8(100))} if self.masked else {}
        return {'image': image, 'label': index, 'id': f'number {index}'} | mask


SMALL_JITTER = functools.partial(transforms.jitter, shift=2)


def train(size, start_step=0, **changes):
    arguments = {'batch_size': 4, 'epochs': 3, 'seed': 7, 'image_size': SIDE, 'augment': SMALL_JITTER}
    batches = pipeline.train_batches(Numbered(size), start_step=start_step, **arguments | changes)
    try:
        return list(batches)
    finally:
        batches.close()


def evaluate(source, **arguments):
    return list(pipeline.eval_batches(source, **{'batch_size': 4, 'image_size': SIDE} | arguments))


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def labels(batches):
    return np.concatenate([batch['label'] for batch in batches]).tolist()


def test_every_epoch_holds_every_example_once_in_another_order():
    batches = train(10, batch_size=5, epochs=4)
    epochs = np.array(labels(batches)).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in epochs.tolist()} | {tuple(range(10))}) == 5
    assert batches[0]['image'].dtype == np.uint8 and batches[0]['image'].shape == (5, SIDE, SIDE, 3)
    assert batches[0]['label'].dtype == np.int32


def test_batches_straddle_epochs_and_only_the_last_remainder_is_lost():
    batches = train(10)
    assert len(batches) == pipeline.train_steps(10, 4, 3) == 7
    seen = labels(batches)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))


def test_same_seed_same_batches_other_seed_other_order():
    assert_same(train(10), train(10))
    assert labels(train(10, seed=8)) != labels(train(10))


def test_augmentation_is_drawn_anew_for_every_example_epoch_and_seed():
    drawn = []

    def augment(image, rng):
        drawn.append(rng.random())
        return image

    for seed in (0, 1, 0):
        train(6, batch_size=6, epochs=2, seed=seed, augment=augment)
    assert len(set(drawn[:24])) == 24
    assert drawn[24:] == drawn[:12]


@pytest.mark.parametrize('start_step', [0, 1, 2, 5, 7])
def test_started_at_a_step_it_continues_as_if_never_stopped(start_step):
    assert_same(train(10, start_step), train(10)[start_step:])


def test_worker_processes_change_nothing():
    want = train(10, 1)
    for num_workers in (1, 2):
        assert_same(train(10, 1, num_workers=num_workers), want)


@pytest.mark.parametrize('size, process_count', [(10, 2), (11, 2), (11, 4), (9, 4)])
@pytest.mark.parametrize('start_step', [0, 3])
def test_processes_share_the_global_batch(size, process_count, start_step):
    whole = train(size, start_step)
    parts = [train(size, start_step, process_index=p, process_count=process_count) for p in range(process_count)]
    assert {len(part) for part in parts} == {len(whole)}
    for batch, *shares in zip(whole, *parts):
        together = {key: np.stack([share[key] for share in shares], 1).reshape(batch[key].shape) for key in batch}
        assert_same([together], [batch])


@pytest.mark.parametrize('size', [1, 4, 7, 8])
@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_evaluation_counts_every_example_once(size, process_count):
    parts = [evaluate(Numbered(size), process_index=p, process_count=process_count) for p in range(process_count)]
    assert {len(part) for part in parts} == {-(-size // 4)}
    batches = list(itertools.chain(*parts))
    assert all(batch['image'].shape == (4 // process_count, SIDE, SIDE, 3) for batch in batches)
    weight, index, label = (np.concatenate([b[key] for b in batches]) for key in ('weight', 'index', 'label'))
    assert weight.dtype == np.float32
    assert sorted(index[weight == 1].tolist()) == list(range(size))
    np.testing.assert_array_equal(label[weight == 1], index[weight == 1])
    assert set(index[weight == 0].tolist()) <= {-1}
    assert set(weight.tolist()) <= {0, 1}


def test_evaluation_shows_images_as_they_are_with_their_masks():
    source = Numbered(5, masked=True)
    batches = evaluate(source)
    for i in range(5):
        np.testing.assert_array_equal(batches[i // 4]['image'][i % 4], source[i]['image'])
        np.testing.assert_array_equal(batches[i // 4]['mask'][i % 4], source[i]['mask'] == 255)
    assert batches[0]['mask'].dtype == bool
    assert not batches[1]['mask'][1:].any() and not batches[1]['image'][1:].any()
    assert 'mask' not in evaluate(Numbered(5))[0]


def test_images_come_at_the_size_asked_for():
    assert train(10, image_size=12)[0]['image'].shape == (4, 12, 12, 3)
    batch = evaluate(Numbered(5, masked=True), image_size=16)[0]
    assert batch['image'].shape == (4, 16, 16, 3) and batch['mask'].shape == (4, 16, 16)
    np.testing.assert_array_equal(batch['mask'][:, ::2, ::2], evaluate(Numbered(5, masked=True))[0]['mask'])


def test_closed_batches_end():
    batches = pipeline.train_batches(Numbered(9), batch_size=3, epochs=100, seed=0, image_size=SIDE)
    next(batches)
    batches.close()
    with pytest.raises(ValueError, match='closed'):
        next(batches)


@pytest.mark.parametrize('changes, message', [
    ({'batch_size': 40}, 'batch_size=40 is larger than the data: 10 examples in 3 epochs'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'process_count': 3}, 'batch_size=4 cannot be split over 3 processes: use a positive multiple of 3'),
    ({'process_index': 2, 'process_count': 2}, r'process_index=2 is outside \[0, 1\]'),
    ({'start_step': 8}, r'start_step=8 is outside \[0, 7\]'),
    ({'start_step': -1}, 'start_step=-1'),
    ({'num_workers': -1}, 'num_workers=-1'),
    ({'epochs': 0}, 'epochs'),
])
def test_sizes_that_do_not_fit_are_refused_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        train(10, **changes)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match='no examples'):
        evaluate(Numbered(0))


@pytest.mark.parametrize('num_workers', [0, 1])
def test_unreadable_image_is_named(num_workers):
    batches = pipeline.train_batches(Broken(4), batch_size=4, epochs=1, seed=0, image_size=SIDE,
                                     num_workers=num_workers)
    with pytest.raises(Exception, match="'number 2': not a readable image"):
        list(batches)
    batches.close()


class Broken(Numbered):
    def __getitem__(self, index):
        return super().__getitem__(index) | ({'image': b'\xff\xd8no'} if index == 2 else {})


def encoded(image, form):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **({'quality': 100, 'subsampling': 0} if form == 'JPEG' else {}))
    return file.getvalue()


@pytest.mark.parametrize('form, error', [('JPEG', 6), ('PNG', 0), ('BMP', 0)])
def test_decoding_gives_back_what_was_encoded(form, error):
    image = Numbered(1)[0]['image']
    got = decode(encoded(image, form))
    assert got.shape == image.shape and got.dtype == np.uint8
    assert np.abs(got.astype(int) - image).max() <= error


def test_grey_and_transparent_images_become_rgb():
    for mode in ('L', 'RGBA', 'P'):
        picture = Image.fromarray(Numbered(1)[0]['image']).convert(mode)
        file = io.BytesIO()
        picture.save(file, 'PNG')
        np.testing.assert_array_equal(decode(file.getvalue()), np.asarray(picture.convert('RGB')))
    grey = encoded(Numbered(1)[0]['image'][..., 0], 'JPEG')
    assert decode(grey).shape == (SIDE, SIDE, 3)


def test_shift_takes_in_the_mirror_image_and_nothing_else_moves():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    padded = np.pad(image, ((3, 3), (3, 3), (0, 0)), 'reflect')
    windows = {padded[y:y + 9, x:x + 7, order].tobytes()
               for y in range(7) for x in range(7) for order in itertools.permutations(range(3))}
    seen = {transforms.jitter(image, np.random.default_rng(i), shift=3, contrast=0, brightness=0).tobytes()
            for i in range(400)}
    assert seen <= windows
    assert len(seen) > 150


def test_jitter_is_a_function_of_its_generator_and_stays_in_range():
    image = Numbered(1)[0]['image']
    first, second = (transforms.jitter(image, np.random.default_rng(3), shift=2, brightness=200) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == image.shape and first.dtype == np.uint8
    for i in range(20):  # no pixel wraps around: all move the same way
        one = transforms.jitter(image, np.random.default_rng(i), shift=0, contrast=0, brightness=255)
        change = np.sort(one.astype(int), -1) - np.sort(image.astype(int), -1)
        assert (change >= 0).all() or (change <= 0).all()


def generated(**changes):
    return sources.open_source('generated', **{'split': 'train', 'path': '', 'image_size': 32, 'num_classes': 5,
                                               'seed': 0} | changes)


def test_generated_images_are_a_function_of_seed_split_and_index():
    image = generated()[4]['image']
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, generated()[4]['image'])
    for other in (generated(seed=1)[4], generated(split='test')[4], generated()[5]):
        assert (image != other['image']).any()
    assert len({generated()[i]['id'] for i in range(20)}) == 20
    assert len(generated(size=17)) == 17
    with pytest.raises(IndexError):
        generated(size=17)[17]


def test_generated_images_tell_their_class():
    """The nearest class centre of spectra, which no phase changes, names the class far above chance."""
    examples = [generated()[i] for i in range(120)]
    spectra = np.array([np.abs(np.fft.fft2(e['image'], axes=(0, 1))).ravel() for e in examples])
    truth = np.array([e['label'] for e in examples])
    assert set(truth) == set(range(5))
    centres = np.array([spectra[:60][truth[:60] == label].mean(0) for label in range(5)])
    guess = ((spectra[60:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (guess == truth[60:]).mean() > 0.9


@pytest.mark.parametrize('changes, message', [
    ({'name': 'digist'}, "unknown source 'digist'; did you mean 'digits'"),
    ({'name': 'cifar'}, 'there are digits, generated'),
    ({'split': 'validation'}, "no split 'validation' .there are train, test"),
    ({'num_classes': 1000}, "num_classes=1000, but source 'digits' has 10"),
    ({'name': 'generated', 'image_size': 0}, 'image_size=0'),
])
def test_wrong_sources_are_refused_before_any_build(tmp_path, changes, message):
    arguments = {'name': 'digits', 'split': 'train', 'path': tmp_path, 'image_size': 64, 'num_classes': 10} | changes
    with pytest.raises(ValueError, match=message):
        sources.open_source(**arguments)
    assert not list(tmp_path.iterdir())
