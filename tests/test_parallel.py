"""Batches put on the devices ahead of time."""

import threading
import time

import jax
import numpy as np
import pytest

from evit_jax import parallel


def mesh():
    return parallel.data_mesh(8)


def batches(count, drawn=None):
    for number in range(count):
        if drawn is not None:
            drawn.append(number)
        yield {'image': np.full((8, 2, 2, 3), number, np.uint8), 'label': np.full(8, number, np.int32)}


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_all_batches_arrive_in_order_split_over_the_devices_as_bytes():
    placed = list(parallel.OnDevices(batches(5), mesh()))
    assert [int(batch['label'][0]) for batch in placed] == list(range(5))
    for number, batch in enumerate(placed):
        assert batch['image'].dtype == np.uint8
        assert batch['image'].sharding.is_equivalent_to(parallel.split_batch(mesh()), 4)
        assert (np.asarray(batch['image']) == number).all()
    assert len({shard.device for shard in placed[0]['image'].addressable_shards}) == len(jax.devices())


def test_at_least_two_batches_are_placed_ahead_and_never_many_more():
    drawn = []
    placed = parallel.OnDevices(batches(100, drawn), mesh(), ahead=2)
    next(placed)
    wait_for(lambda: len(drawn) >= 3)
    time.sleep(0.3)
    assert 3 <= len(drawn) <= 4
    placed.close()


def test_the_end_stays_the_end():
    placed = parallel.OnDevices(batches(1), mesh())
    next(placed)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(placed)


def test_an_error_in_reading_is_raised_where_the_batch_is_asked_for():
    def broken():
        yield from batches(2)
        raise OSError('the disk is gone')

    placed = parallel.OnDevices(broken(), mesh())
    next(placed), next(placed)
    with pytest.raises(OSError, match='the disk is gone'):
        next(placed)
    placed.close()


def test_closing_ends_the_thread_though_batches_are_left():
    placed = parallel.OnDevices(batches(100), mesh())
    next(placed)
    placed.close()
    assert 'on devices' not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ValueError, match='closed'):
        next(placed)


def test_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match='ahead=0'):
        parallel.OnDevices(batches(1), mesh(), ahead=0)
