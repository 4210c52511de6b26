"""How the processes of a run meet and agree, and batches put on the devices ahead of time."""

import threading
import time

import jax
import numpy as np
import pytest

from evit_jax.runtime import distributed, prefetch, sharding


def mesh():
    return sharding.data_mesh(8)


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


@pytest.fixture
def joined(monkeypatch):
    """What JAX is asked to join; a ValueError where it would look for a cluster in vain."""
    asked = []

    def initialize(**how):
        asked.append(how)
        if 'coordinator_address' not in how:
            raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    return asked


def told(monkeypatch, address='10.0.0.1:8476', count='4', number='3'):
    for name, value in zip(('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'), (address, count, number)):
        if value is not None:
            monkeypatch.setenv(name, value)


def test_processes_named_by_the_environment_are_joined_within_bounded_times(joined, monkeypatch):
    told(monkeypatch)
    distributed.start()
    bounds = [joined[0].pop(name) for name in ('initialization_timeout', 'heartbeat_timeout_seconds')]
    assert joined == [{'coordinator_address': '10.0.0.1:8476', 'num_processes': 4, 'process_id': 3,
                       'cluster_detection_method': 'deactivate'}]
    assert all(0 < seconds <= 300 for seconds in bounds)


def test_without_them_jax_looks_for_a_cluster_and_a_single_machine_is_none(joined):
    distributed.start()
    assert len(joined) == 1 and not {'coordinator_address', 'cluster_detection_method'} & joined[0].keys()


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'count': None}, 'NUM_PROCESSES is not set, but COORDINATOR_ADDRESS, PROCESS_ID is: set all of'),
    ({'address': None, 'number': ' '}, 'COORDINATOR_ADDRESS is not set, but NUM_PROCESSES is'),
    ({'address': '10.0.0.1'}, "COORDINATOR_ADDRESS='10.0.0.1' is no host:port: give the address of process 0"),
    ({'address': ':80'}, "COORDINATOR_ADDRESS=':80' is no host:port"),
    ({'address': 'host:70000'}, "COORDINATOR_ADDRESS='host:70000' is no host:port"),
    ({'count': 'four'}, "NUM_PROCESSES='four' is no number of processes: give 1 or more"),
    ({'count': '0'}, "NUM_PROCESSES='0' is no number of processes"),
    ({'number': '4'}, r"PROCESS_ID='4' is outside \[0, 3\], for NUM_PROCESSES=4: count the processes from 0"),
    ({'number': '-1'}, r"PROCESS_ID='-1' is outside \[0, 3\]"),
])
def test_an_environment_that_cannot_be_is_refused_by_name(joined, monkeypatch, wrong, message):
    told(monkeypatch, **wrong)
    with pytest.raises(ValueError, match=message):
        distributed.start()
    assert not joined


def test_alone_a_process_decides_and_adds_up_for_itself():
    assert distributed.on_process_zero(lambda: 'done') == 'done'
    with pytest.raises(ValueError, match='no'):
        distributed.on_process_zero(lambda: int('no'))
    assert distributed.sum_over_processes({'a': 2.5, 'b': 0.1}) == {'a': 2.5, 'b': 0.1}


def test_totals_of_processes_are_not_rounded_to_float32(monkeypatch):
    others = {'a': 2.0**53 - 1, 'b': 0.1}

    def gather(own):
        return np.stack([own, np.array([*others.values()]).view(np.uint8)])

    monkeypatch.setattr(distributed, 'is_single_process', lambda: False)
    monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', gather)
    assert distributed.sum_over_processes({'a': 1.0, 'b': 0.2}) == {'a': 2.0**53, 'b': 0.2 + 0.1}


@pytest.mark.parametrize(('shape', 'spec'), [
    ((64, 256), (None, 'data')), ((256, 64), ('data',)), ((8, 2048), (None, 'data')), ((128, 128), ('data',)),
    ((3, 3, 40, 64), (None, None, None, 'data')), ((99, 1000), (None, 'data')),
    ((999, 99), ()), ((16_384,), ('data',)), ((16_376,), ()), ((), ()),
])
def test_a_divided_array_is_cut_along_its_largest_axis_that_the_devices_divide(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    for how, want in (('fsdp', spec), ('replicated', ())):
        got = sharding.state_shardings({'a': leaf}, mesh(), how)['a']
        assert got.is_equivalent_to(jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*want)), len(shape))


def test_all_batches_arrive_in_order_split_over_the_devices_as_bytes():
    placed = list(prefetch.DevicePrefetcher(batches(5), mesh()))
    assert [int(batch['label'][0]) for batch in placed] == list(range(5))
    for number, batch in enumerate(placed):
        assert batch['image'].dtype == np.uint8
        assert batch['image'].sharding.is_equivalent_to(sharding.batch_sharding(mesh()), 4)
        assert (np.asarray(batch['image']) == number).all()
    assert len({shard.device for shard in placed[0]['image'].addressable_shards}) == len(jax.devices())


def test_at_least_two_batches_are_placed_ahead_and_never_many_more():
    drawn = []
    placed = prefetch.DevicePrefetcher(batches(100, drawn), mesh(), ahead=2)
    next(placed)
    wait_for(lambda: len(drawn) >= 3)
    time.sleep(0.3)
    assert 3 <= len(drawn) <= 4
    placed.close()
    assert placed._placed.empty()  # a batch left there holds shared memory of the workers until the process ends


def test_the_end_stays_the_end():
    placed = prefetch.DevicePrefetcher(batches(1), mesh())
    next(placed)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(placed)


def test_an_error_in_reading_is_raised_where_the_batch_is_asked_for():
    def broken():
        yield from batches(2)
        raise OSError('the disk is gone')

    placed = prefetch.DevicePrefetcher(broken(), mesh())
    next(placed), next(placed)
    with pytest.raises(OSError, match='the disk is gone'):
        next(placed)
    placed.close()


def test_closing_ends_the_thread_though_batches_are_left():
    placed = prefetch.DevicePrefetcher(batches(100), mesh())
    next(placed)
    placed.close()
    assert 'on devices' not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ValueError, match='closed'):
        next(placed)


def test_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match='ahead=0'):
        prefetch.DevicePrefetcher(batches(1), mesh(), ahead=0)
