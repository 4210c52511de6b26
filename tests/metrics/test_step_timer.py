"""The step timer: rates, waiting times, and the warning about a step that takes much longer than usual."""

import re
import time

import pytest

from evit_jax.metrics.step_timer import StepTimer

METRICS = {'loss': 1.0, 'lr': 1e-3}


class Clock:
    """A clock that the test advances."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def advance(self, seconds):
        self.now += seconds


class Writer:
    def write_scalars(self, step, scalars):
        self.step, self.scalars = step, scalars


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def timer(clock):
    return StepTimer(100, 8, min_slow=20.0, clock=clock, watch=False)


def run_fast_steps(timer, clock, count=6):
    for number in range(count):
        timer.step(number)
        clock.advance(1.0)


def test_write_reports_the_rates_of_the_steps_since_the_last_line(timer, clock):
    writer = Writer()
    timer.restart(10)
    with timer.phase('input'):
        clock.advance(1.0)
    clock.advance(3.0)
    timer.write(14, 0.5, METRICS, 0.7, writer)
    assert writer.step == 14 and writer.scalars == {
        'train/loss': 1.0, 'train/lr': 1e-3, 'train/keep_rate': 0.7, 'train/images_per_second': 8.0,
        'train/step_seconds': 1.0, 'train/input_wait': 0.25, 'train/compile_wait': 0.0, 'train/save_wait': 0.0}
    clock.advance(0.5)
    timer.write(15, 0.5, METRICS, 0.7, writer)
    assert writer.scalars['train/step_seconds'] == 0.5 and writer.scalars['train/input_wait'] == 0


def test_write_logs_the_share_of_the_time_spent_waiting_for_a_program(timer, clock, caplog):
    caplog.set_level('INFO')
    timer.restart(0)
    with timer.phase('compile'):
        clock.advance(0.75)
    clock.advance(0.25)
    timer.write(1, 0.5, METRICS, 0.7, Writer())
    clock.advance(1.0)
    timer.write(2, 0.5, METRICS, 0.7, Writer())
    assert re.findall(r'compile wait (\S+) %', caplog.text) == ['75.0', '0.0']


def test_slow_step_is_logged_at_each_doubling_with_its_phase_and_at_its_end(timer, clock, caplog):
    run_fast_steps(timer, clock)
    timer.step(6)
    with timer.phase('input'):
        for _ in range(100):
            clock.advance(1.0)
            timer.check_current_step()
    during = [record.getMessage() for record in caplog.records]
    assert during == [f'step 6 has taken {seconds} s so far, usually 1 s: waiting for the input'
                      for seconds in (21, 43, 87)]
    timer.step(7)
    assert 'step 6 took 100.0 s' in caplog.text and 'step 7' not in caplog.text


def test_slow_step_is_not_logged_before_enough_steps_nor_in_an_evaluation(timer, clock, caplog):
    timer.step(0)
    clock.advance(100.0)
    timer.check_current_step()
    timer.step(1)
    run_fast_steps(timer, clock)
    timer.restart(6)
    clock.advance(100.0)
    timer.check_current_step()
    timer.step(6)
    assert not caplog.text


def test_slow_step_is_logged_by_the_background_thread(caplog):
    timer = StepTimer(100, 8, min_slow=0.01)
    for number in range(7):
        timer.step(number)
    deadline = time.monotonic() + 10
    while 'step 6 has taken' not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.01)
    timer.close()
    assert 'step 6 has taken' in caplog.text
