import io
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import NamedTuple

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


class Jitter(NamedTuple):
    """What a training transform is to the pipeline: any image to one size, changed at random."""
    size: int = SIDE

    def __call__(self, image, rng):
        return transforms.jitter(transforms.resize(image, self.size), rng, shift=2)


class Plain(NamedTuple):
    """What an evaluation transform is to the pipeline."""
    size: int = SIDE

    def __call__(self, image):
        return transforms.resize(image, self.size)

    def mask(self, mask):
        return transforms.decode_mask(mask, self.size)


def marked(image, rng):
    """The image's first pixel, which names it, and random bytes."""
    noise = np.frombuffer(rng.bytes(3 * SIDE * SIDE), np.uint8).reshape(SIDE, SIDE, 3).copy()
    noise[0, 0] = image[0, 0]
    return noise


def read_all(batches):
    try:
        return list(batches)
    finally:
        batches.close()


def train(source, start_step=0, **changes):
    arguments = {'batch_size': 4, 'epochs': 3, 'seed': 7, 'transform': Jitter()}
    source = Numbered(source) if isinstance(source, int) else source
    return read_all(pipeline.train_batches(source, start_step=start_step, **arguments | changes))


def evaluate(source, **arguments):
    return read_all(pipeline.eval_batches(source, **{'batch_size': 4, 'transform': Plain()} | arguments))


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def joined(batches, key='label'):
    return np.concatenate([batch[key] for batch in batches])


def labels(batches):
    return joined(batches).tolist()


def test_every_epoch_holds_every_example_once_in_another_order():
    batches = train(10, batch_size=5, epochs=4)
    epochs = np.array(labels(batches)).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in epochs.tolist()} | {tuple(range(10))}) == 5
    assert batches[0]['image'].dtype == np.uint8 and batches[0]['image'].shape == (5, SIDE, SIDE, 3)
    assert batches[0]['label'].dtype == np.int32 and not batches[0]['failed'].size


def test_batches_straddle_epochs_and_only_the_last_remainder_is_lost():
    batches = train(10)
    assert len(batches) == pipeline.train_steps(10, 4, 3) == 7
    seen = labels(batches)
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))


def test_images_are_those_of_their_labels():
    for batch in train(10, transform=marked):
        for image, label in zip(batch['image'], batch['label'].tolist()):
            np.testing.assert_array_equal(image[0, 0], Numbered(10)[label]['image'][0, 0])


def test_same_seed_same_batches_other_seed_other_order():
    assert_same(train(10), train(10))
    assert labels(train(10, seed=8)) != labels(train(10))
    assert labels(train(10, seed=-1)) != labels(train(10))


@pytest.mark.parametrize('repeats', [1, 3])
def test_augmentation_is_drawn_anew_for_every_example_epoch_copy_and_seed(repeats):
    def drawn(seed):
        return [image.tobytes() for image in
                joined(train(6, batch_size=6, epochs=2, seed=seed, transform=marked, repeats=repeats), 'image')]

    assert len({*drawn(0), *drawn(1)}) == 24
    assert drawn(0) == drawn(0)


def test_an_augmentation_depends_on_epoch_and_example_not_on_its_place():
    """The same example of the same epoch looks the same in batches of another size."""
    small, large = (train(10, batch_size=size, epochs=1, transform=marked) for size in (2, 10))
    np.testing.assert_array_equal(joined(small, 'image'), joined(large, 'image'))


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('start_step', [0, 1, 2, 5, 7])
def test_started_at_a_step_it_continues_as_if_never_stopped(start_step, repeats):
    assert_same(train(10, start_step, repeats=repeats), train(10, repeats=repeats)[start_step:])


def test_worker_processes_change_nothing():
    want = train(Broken(10), 1, repeats=3)
    for num_workers in (1, 2):
        assert_same(train(Broken(10), 1, repeats=3, num_workers=num_workers), want)


def test_more_workers_than_batches_change_nothing_in_evaluation_either():
    assert_same(evaluate(Broken(5, masked=True), num_workers=3), evaluate(Broken(5, masked=True)))


@pytest.mark.parametrize('repeats', [1, 3])
@pytest.mark.parametrize('size, process_count', [(10, 2), (11, 2), (11, 4), (9, 4)])
@pytest.mark.parametrize('start_step', [0, 3])
def test_processes_hold_contiguous_rows_of_the_global_batch(size, process_count, start_step, repeats):
    for source in (Numbered(size), Broken(size)):
        whole = train(source, start_step, repeats=repeats)
        parts = [train(source, start_step, repeats=repeats, process_index=p, process_count=process_count)
                 for p in range(process_count)]
        assert {len(part) for part in parts} == {len(whole)}
        assert_same([{key: joined(shares, key) for key in whole[0]} for shares in zip(*parts)], whole)


def test_repeated_copies_stand_in_a_row_and_differ():
    seen = labels(train(10, batch_size=6, epochs=1, repeats=3))
    assert seen == np.repeat(seen[::3], 3).tolist() and len(set(seen)) == 2
    images = joined(train(10, batch_size=6, epochs=1, repeats=3, transform=marked), 'image')
    assert len({image.tobytes() for image in images}) == 6


def test_an_epoch_with_repeats_is_no_longer_and_visits_a_third_of_the_images():
    seen = np.array(labels(train(600, batch_size=128, epochs=8, repeats=3))).reshape(8, 512)
    assert pipeline.epoch_samples(600, 3) == 512 and pipeline.epoch_samples(600) == 600
    assert pipeline.epoch_samples(1_281_167, 3) == 1_281_024
    assert {len(set(epoch.tolist())) for epoch in seen} == {171}
    assert len(set(seen.ravel().tolist())) > 550  # another third each time


def test_copies_are_decoded_once_per_batch():
    counting = Counting(30)
    train(counting, batch_size=10, epochs=1, repeats=3, transform=marked)
    assert len(counting.read) == 3 * 4  # ten rows: three images, and one that goes on in the next batch


class Counting(Numbered):
    def __init__(self, size):
        super().__init__(size)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize('size', [1, 4, 7, 8])
@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_evaluation_counts_every_example_once(size, process_count):
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


def test_evaluation_keeps_the_order_of_the_source_over_processes():
    parts = [evaluate(Numbered(7), process_index=p, process_count=2) for p in range(2)]
    assert np.concatenate([joined(shares, 'index') for shares in zip(*parts)]).tolist() == [*range(7), -1]


def test_evaluation_shows_images_as_they_are_with_their_masks():
    source = Numbered(5, masked=True)
    batches = evaluate(source)
    for i in range(5):
        np.testing.assert_array_equal(batches[i // 4]['image'][i % 4], source[i]['image'])
        np.testing.assert_array_equal(batches[i // 4]['mask'][i % 4], source[i]['mask'] == 255)
    assert batches[0]['mask'].dtype == bool
    assert not batches[1]['mask'][1:].any() and not batches[1]['image'][1:].any()
    assert 'mask' not in evaluate(Numbered(5))[0]


def test_images_come_at_the_size_of_the_transform():
    assert train(10, transform=Jitter(12))[0]['image'].shape == (4, 12, 12, 3)
    batch = evaluate(Numbered(5, masked=True), transform=Plain(16))[0]
    assert batch['image'].shape == (4, 16, 16, 3) and batch['mask'].shape == (4, 16, 16)
    np.testing.assert_array_equal(batch['mask'][:, ::2, ::2], evaluate(Numbered(5, masked=True))[0]['mask'])


@pytest.mark.parametrize('num_workers', [0, 1])
def test_closed_batches_end(num_workers):
    batches = pipeline.train_batches(Numbered(9), batch_size=3, epochs=100, seed=0, transform=Jitter(),
                                     num_workers=num_workers)
    next(batches)
    batches.close()
    with pytest.raises(ValueError, match='closed'):
        next(batches)


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
def test_sizes_that_do_not_fit_are_refused_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        train(10, **changes)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(ValueError, match='no examples'):
        evaluate(Numbered(0))


class Broken(Numbered):
    """Every fifth example from 2 on is no image, every fifth from 3 on cannot even be read."""

    def __getitem__(self, index):
        if index % 5 == 3:
            raise OSError(f'disk error at {index}')
        return super().__getitem__(index) | ({'image': b'\xff\xd8no'} if index % 5 == 2 else {})


def test_an_unreadable_example_is_replaced_by_a_readable_one_and_reported():
    batches = train(Broken(10), transform=marked)
    failed = joined(batches, 'failed').tolist()
    assert len(failed) == sum(label % 5 in (2, 3) for label in labels(train(10)))
    assert {text.split(': ')[0] for text in failed} == {'number 2', 'number 7', 'example 3', 'example 8'}
    assert any('not a readable image' in text for text in failed) and any('disk error at 3' in text for text in failed)
    assert not {label % 5 for label in labels(batches)} & {2, 3}
    whole = labels(train(10))
    assert [label for label, asked in zip(labels(batches), whole) if asked % 5 not in (2, 3)] == [
        asked for asked in whole if asked % 5 not in (2, 3)]
    for image, label in zip(joined(batches, 'image'), labels(batches)):
        np.testing.assert_array_equal(image[0, 0], Numbered(10)[label]['image'][0, 0])


def test_a_transform_that_refuses_an_image_counts_as_a_failure():
    def picky(image, rng):
        if np.array_equal(image, Numbered(10)[4]['image']):
            raise ValueError('too dark')
        return marked(image, rng)

    batches = train(10, transform=picky, batch_size=10, epochs=1)
    assert joined(batches, 'failed').tolist() == ['number 4: too dark']
    assert 4 not in labels(batches)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_data_of_which_nothing_can_be_read_stop_the_run(num_workers):
    batches = pipeline.train_batches(Nothing(4), batch_size=4, epochs=1, seed=0, transform=Jitter(),
                                     num_workers=num_workers)
    with pytest.raises(ValueError, match=r"17 examples in a row cannot be read, the last one .number \d: not a"):
        list(batches)
    batches.close()


class Nothing(Numbered):
    def __getitem__(self, index):
        return super().__getitem__(index) | {'image': b''}


def test_in_evaluation_an_unreadable_example_has_no_weight_and_is_reported():
    batches = evaluate(Broken(9, masked=True))
    assert joined(batches, 'index').tolist() == [*range(9), -1, -1, -1]
    assert joined(batches, 'weight').tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert [text.split(':')[0] for text in joined(batches, 'failed').tolist()] == [
        'number 2', 'example 3', 'number 7', 'example 8']
    assert not joined(batches, 'image')[[2, 3]].any()


class Deadly(Numbered):
    """Kills the worker that reads example 5, as the kernel does when memory is short."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize('num_workers', [1, 2])
def test_a_killed_worker_is_an_error_within_seconds_and_no_hang(num_workers):
    batches = pipeline.eval_batches(Deadly(8), batch_size=1, transform=Plain(), num_workers=num_workers)
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match=r'input died with exit code -9 \(killed.*data.workers'):
        list(batches)
    batches.close()
    assert time.monotonic() - begin < 30


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    code = ('import sys, time, multiprocessing\n'
            'from tests.test_pipeline import Numbered, Plain, pipeline\n'
            'if __name__ == "__main__":\n'
            '  batches = pipeline.eval_batches(Numbered(999), batch_size=1, transform=Plain(), num_workers=2)\n'
            '  next(batches)\n'
            '  print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n'
            '  time.sleep(60)\n')
    script = tmp_path / 'parent.py'
    script.write_text(code)
    root = pathlib.Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, str(script)], cwd=root, env=os.environ | {'PYTHONPATH': str(root)},
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = pathlib.Path(f'/proc/{pid}/stat')
    return not state.exists() or state.read_text().rpartition(')')[2].split()[0] != 'Z'


class Noted(Numbered):
    """Notes in a file what is read, by whichever process."""

    def __init__(self, size, file):
        super().__init__(size)
        self.file = file

    def __getitem__(self, index):
        with open(self.file, 'a') as file:
            file.write('x')
        return super().__getitem__(index)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_no_more_batches_are_made_ahead_than_is_said(num_workers, tmp_path):
    file = tmp_path / 'read'
    batches = pipeline.eval_batches(Noted(99, file), batch_size=1, transform=Plain(), num_workers=num_workers)
    for _ in range(3):
        next(batches)
    before, made, deadline = -1, 0, time.monotonic() + 20
    while (made > before or made == 3) and time.monotonic() < deadline:  # until they rest
        time.sleep(0.5)
        before, made = made, file.stat().st_size
    batches.close()
    assert 3 < made <= 2 + batches.held < 20


def test_the_memory_that_is_taken_is_logged(caplog):
    with caplog.at_level('INFO'):
        train(4, transform=Jitter(224))
    assert 'input: a thread holds at most 3 batches of 0.6 MB, 2 MB in all' in caplog.text


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
