"""Initialisation of several processes, sums over them, shardings, and the prefetch of batches to the devices."""

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
    """Records the arguments of `jax.distributed.initialize`. The call fails, as without a cluster."""
    calls = []

    def initialize(**arguments):
        calls.append(arguments)
        if 'coordinator_address' not in arguments:
            raise ValueError('coordinator_address should be defined.')

    monkeypatch.setattr(jax.distributed, 'initialize', initialize)
    for name in ('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'):
        monkeypatch.delenv(name, raising=False)
    return calls


def set_environment(monkeypatch, address='10.0.0.1:8476', count='4', number='3'):
    for name, value in zip(('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'), (address, count, number)):
        if value is not None:
            monkeypatch.setenv(name, value)


def test_start_with_environment_variables_joins_the_processes_within_bounded_times(joined, monkeypatch):
    set_environment(monkeypatch)
    distributed.start()
    bounds = [joined[0].pop(name) for name in ('initialization_timeout', 'heartbeat_timeout_seconds')]
    assert joined == [{'coordinator_address': '10.0.0.1:8476', 'num_processes': 4, 'process_id': 3,
                       'cluster_detection_method': 'deactivate'}]
    assert all(0 < seconds <= 300 for seconds in bounds)


def test_start_without_variables_lets_jax_detect_a_cluster(joined):
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
def test_start_with_impossible_variables_is_refused_by_name(joined, monkeypatch, wrong, message):
    set_environment(monkeypatch, **wrong)
    with pytest.raises(ValueError, match=message):
        distributed.start()
    assert not joined


def test_single_process_runs_tasks_and_sums_alone():
    assert distributed.on_process_zero(lambda: 'done') == 'done'
    with pytest.raises(ValueError, match='no'):
        distributed.on_process_zero(lambda: int('no'))
    assert distributed.sum_over_processes({'a': 2.5, 'b': 0.1}) == {'a': 2.5, 'b': 0.1}


def test_sum_over_processes_is_not_rounded_to_float32(monkeypatch):
    other_process = {'a': 2.0**53 - 1, 'b': 0.1}

    def gather(own):
        return np.stack([own, np.array([*other_process.values()]).view(np.uint8)])

    monkeypatch.setattr(distributed, 'is_single_process', lambda: False)
    monkeypatch.setattr(distributed.multihost_utils, 'process_allgather', gather)
    assert distributed.sum_over_processes({'a': 1.0, 'b': 0.2}) == {'a': 2.0**53, 'b': 0.2 + 0.1}


@pytest.mark.parametrize(('shape', 'spec'), [
    ((64, 256), (None, 'data')), ((256, 64), ('data',)), ((8, 2048), (None, 'data')), ((128, 128), ('data',)),
    ((3, 3, 40, 64), (None, None, None, 'data')), ((99, 1000), (None, 'data')),
    ((999, 99), ()), ((16_384,), ('data',)), ((16_376,), ()), ((), ()),
])
def test_state_shardings_fsdp_splits_the_largest_divisible_axis(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    for how, expected in (('fsdp', spec), ('replicated', ())):
        result = sharding.state_shardings({'a': leaf}, mesh(), how)['a']
        assert result.is_equivalent_to(jax.sharding.NamedSharding(mesh(), jax.sharding.PartitionSpec(*expected)),
                                       len(shape))


def test_prefetcher_yields_all_batches_in_order_split_over_the_devices():
    transferred = list(prefetch.DevicePrefetcher(batches(5), mesh()))
    assert [int(batch['label'][0]) for batch in transferred] == list(range(5))
    for number, batch in enumerate(transferred):
        assert batch['image'].dtype == np.uint8
        assert batch['image'].sharding.is_equivalent_to(sharding.batch_sharding(mesh()), 4)
        assert (np.asarray(batch['image']) == number).all()
    assert len({shard.device for shard in transferred[0]['image'].addressable_shards}) == len(jax.devices())


def test_prefetcher_transfers_two_batches_ahead_and_few_more():
    drawn = []
    prefetcher = prefetch.DevicePrefetcher(batches(100, drawn), mesh(), ahead=2)
    next(prefetcher)
    wait_for(lambda: len(drawn) >= 3)
    time.sleep(0.1)  # time for further transfers
    assert 3 <= len(drawn) <= 4
    prefetcher.close()
    assert prefetcher._queue.empty()  # a batch left there holds shared memory of the workers until the process ends


def test_prefetcher_after_the_end_stays_at_the_end():
    prefetcher = prefetch.DevicePrefetcher(batches(1), mesh())
    next(prefetcher)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(prefetcher)


def test_prefetcher_raises_a_read_error_at_its_batch():
    def broken():
        yield from batches(2)
        raise OSError('the disk is gone')

    prefetcher = prefetch.DevicePrefetcher(broken(), mesh())
    next(prefetcher), next(prefetcher)
    with pytest.raises(OSError, match='the disk is gone'):
        next(prefetcher)
    prefetcher.close()


def test_prefetcher_close_with_remaining_batches_ends_the_thread():
    prefetcher = prefetch.DevicePrefetcher(batches(100), mesh())
    next(prefetcher)
    prefetcher.close()
    assert 'prefetch' not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ValueError, match='closed'):
        next(prefetcher)


def test_prefetcher_with_nothing_ahead_is_refused():
    with pytest.raises(ValueError, match='ahead=0'):
        prefetch.DevicePrefetcher(batches(1), mesh(), ahead=0)
