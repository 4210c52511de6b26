"""Tests of unreadable examples: they are replaced or skipped, logged and counted, and too many raise."""

import logging

import numpy as np
import pytest

from evit_jax.data import pipeline
from evit_jax.data.failures import Failures
from evit_jax.data.order import SampleOrder
from evit_jax.runtime import distributed
from tests.helpers.encoded import JPEGS, corrupted
from tests.helpers.toys import Broken, Jitter, Numbered, evaluate, joined, labels, marked, train


def batch(*failed, size=10):
    return {'label': np.zeros(size, np.int32), 'failed': np.array(failed, str)}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_failures_take_removes_and_counts_failed_samples():
    failures = Failures(0.5, examples=100)
    assert failures.take(batch('a: torn', 'b: empty')).keys() == {'label'}
    failures.take(batch())
    assert (failures.num_failed, failures.num_samples) == (2, 20)


def test_failures_take_does_not_count_padding():
    failures = Failures(0.5, examples=3)
    failures.take(batch('a: torn', size=4) | {'index': np.array([0, 1, 2, -1])})
    assert (failures.num_failed, failures.num_samples) == (1, 3)


@pytest.mark.parametrize('limit, examples, allowed', [(0.1, 30, 3), (0.1, 5, 1), (0.0, 1000, 0), (1.0, 12, 12)])
def test_failures_above_the_fraction_of_one_pass_or_of_all_samples_raise(limit, examples, allowed):
    failures = Failures(limit, examples)
    failures.take(batch(*['a: torn'] * allowed))
    with pytest.raises(ValueError, match=rf"{allowed + 1} of 10 samples could not be read, the last one 'z: torn'; "
                                         rf'data.max_failed={limit} allows {allowed}: repair'):
        failures.take(batch('z: torn', size=0))


def test_failures_limit_grows_with_the_number_of_samples():
    failures = Failures(0.1, examples=10)
    for number in range(50):
        failures.take(batch(f'{number}: torn'))
    with pytest.raises(ValueError, match='52 of 510 samples could not be read'):
        failures.take(batch('x: torn', 'y: torn'))


def test_failures_of_several_processes_are_summed_and_raise_in_check_only(monkeypatch):
    monkeypatch.setattr(distributed, 'is_single_process', lambda: False)
    monkeypatch.setattr(distributed, 'sum_over_processes',
                        lambda own: {'failed': own['failed'] + 7, 'samples': own['samples'] + 40})
    failures = Failures(0.1, examples=60)
    failures.take(batch())
    with pytest.raises(ValueError, match=r'7 of 50 samples could not be read, none of them in this .* allows 6'):
        failures.check()
    batches = failures.checked([batch(*'abcde'), batch()])
    assert [next(batches).keys(), next(batches).keys()] == [{'label'}, {'label'}]
    with pytest.raises(ValueError, match=r"12 of 70 samples could not be read, the last one 'e'; .*allows 7"):
        next(batches)


def test_failures_log_each_example_once_and_then_counts_only(caplog):
    failures = Failures(1.0, examples=1)
    for _ in range(3):
        failures.take(batch('a: torn', 'b: empty', 'a: torn'))
    assert warnings(caplog) == ['cannot be read: a: torn', 'cannot be read: b: empty']
    for number in range(1000):
        failures.take(batch(f'{number}: torn'))
    assert len(warnings(caplog)) < 40
    assert 'further ones are only counted' in warnings(caplog)[19]
    assert 'samples could not be read so far' in warnings(caplog)[-1]


@pytest.mark.parametrize('limit', [-0.1, 1.1])
def test_failures_limit_outside_0_to_1_raises(limit):
    with pytest.raises(ValueError, match=r'data.max_failed=.* is outside \[0, 1\]'):
        Failures(limit, 10)


def test_train_batches_unreadable_example_is_replaced_and_reported():
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


def test_train_batches_error_in_the_transform_counts_as_a_failure():
    def picky(image, rng):
        if np.array_equal(image, Numbered(10)[4]['image']):
            raise ValueError('too dark')
        return marked(image, rng)

    batches = train(10, transform=picky, batch_size=10, epochs=1)
    assert joined(batches, 'failed').tolist() == ['number 4: too dark']
    assert 4 not in labels(batches)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_train_batches_only_unreadable_examples_raise(num_workers):
    batches = pipeline.train_batches(Nothing(4), SampleOrder(4, epochs=1, seed=0), Jitter(), num_workers=num_workers)
    with pytest.raises(ValueError, match=r"17 examples in a row cannot be read, the last one .number \d: not a"):
        list(batches)
    batches.close()


class Nothing(Numbered):
    def __getitem__(self, index):
        return super().__getitem__(index) | {'image': b''}


def test_eval_batches_unreadable_example_has_weight_0_and_is_reported():
    batches = evaluate(Broken(9, masked=True))
    assert joined(batches, 'index').tolist() == [*range(9), -1, -1, -1]
    assert joined(batches, 'weight').tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert [text.split(':')[0] for text in joined(batches, 'failed').tolist()] == [
        'number 2', 'example 3', 'number 7', 'example 8']
    assert not joined(batches, 'image')[[2, 3]].any()


class Corrupted(Numbered):
    """JPEG files with flipped bits, missing parts or inserted bytes."""

    def __getitem__(self, index):
        files = [*JPEGS.values()]
        broken = corrupted(np.random.default_rng(index), files[index % len(files)])
        return super().__getitem__(index) | {'image': broken}


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow warns of damaged EXIF
@pytest.mark.parametrize('num_workers', [0, 2])
def test_eval_batches_1000_corrupted_jpegs_are_read_or_counted(num_workers):
    failures = Failures(1.0, examples=1000)
    shown = sum(failures.take(batch)['weight'].sum()
                for batch in evaluate(Corrupted(1000), batch_size=64, num_workers=num_workers))
    assert failures.num_samples == 1000
    assert failures.num_failed > 300 and shown > 200
    assert shown + failures.num_failed == 1000
