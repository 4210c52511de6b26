import logging

import numpy as np
import pytest

from evit_jax.data.failures import Failures


def batch(*failed, size=10):
    return {'label': np.zeros(size, np.int32), 'failed': np.array(failed, str)}


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_the_batch_goes_on_without_its_failures_which_are_counted():
    failures = Failures(0.5, examples=100)
    assert failures.take(batch('a: torn', 'b: empty')).keys() == {'label'}
    failures.take(batch())
    assert (failures.count, failures.seen) == (2, 20)


def test_in_evaluation_what_fills_the_last_batch_is_not_seen():
    failures = Failures(0.5, examples=3)
    failures.take(batch('a: torn', size=4) | {'index': np.array([0, 1, 2, -1])})
    assert (failures.count, failures.seen) == (1, 3)


@pytest.mark.parametrize('limit, examples, allowed', [(0.1, 30, 3), (0.1, 5, 1), (0.0, 1000, 0), (1.0, 12, 12)])
def test_the_limit_is_a_share_of_one_pass_or_of_all_seen_if_that_is_more(limit, examples, allowed):
    failures = Failures(limit, examples)
    failures.take(batch(*['a: torn'] * allowed))
    with pytest.raises(ValueError, match=rf"{allowed + 1} of 10 samples could not be read, the last one 'z: torn'; "
                                         rf'data.max_failed={limit} allows {allowed}: mend'):
        failures.take(batch('z: torn', size=0))


def test_the_limit_grows_with_what_is_seen():
    failures = Failures(0.1, examples=10)
    for number in range(50):
        failures.take(batch(f'{number}: torn'))
    with pytest.raises(ValueError, match='52 of 510 samples could not be read'):
        failures.take(batch('x: torn', 'y: torn'))


def test_each_file_is_named_once_and_a_flood_is_counted(caplog):
    failures = Failures(1.0, examples=1)
    for _ in range(3):
        failures.take(batch('a: torn', 'b: empty', 'a: torn'))
    assert warnings(caplog) == ['cannot be read: a: torn', 'cannot be read: b: empty']
    for number in range(1000):
        failures.take(batch(f'{number}: torn'))
    assert len(warnings(caplog)) < 40
    assert 'more of them are only counted' in warnings(caplog)[19]
    assert 'samples could not be read so far' in warnings(caplog)[-1]


@pytest.mark.parametrize('limit', [-0.1, 1.1])
def test_a_limit_that_is_no_share_is_refused(limit):
    with pytest.raises(ValueError, match=r'data.max_failed=.* is outside \[0, 1\]'):
        Failures(limit, 10)
