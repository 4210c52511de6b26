"""Rates and waits of a run, and the line about a step that takes far longer than usual."""

import pathlib
import re
import time

import jax
import pytest

from evit_jax.metrics.step_timer import StepTimer
from evit_jax.runtime import storage
from evit_jax.runtime.profiler import StepProfiler, parse_steps

METRICS = {'loss': 1.0, 'lr': 1e-3}


class Written:
    def write_scalars(self, step, scalars):
        self.step, self.scalars = step, scalars


@pytest.fixture
def timer():
    made = StepTimer(100, 8, least=0.05)
    yield made
    made.close()


def fast_steps(timer, count=6):
    for number in range(count):
        timer.step(number)
        time.sleep(0.001)


def test_the_scalars_are_about_the_steps_since_the_last_line(timer):
    writer = Written()
    timer.restart(10)
    with timer.phase('input'):
        time.sleep(0.1)
    time.sleep(0.1)
    timer.write(14, 0.5, METRICS, 0.7, writer)
    assert writer.step == 14 and writer.scalars['train/loss'] == 1.0 and writer.scalars['train/keep_rate'] == 0.7
    assert 0.05 <= writer.scalars['train/step_seconds'] < 0.2
    assert writer.scalars['train/images_per_second'] == pytest.approx(8 / writer.scalars['train/step_seconds'])
    assert 0.1 < writer.scalars['train/input_wait'] < 0.9 and writer.scalars['train/save_wait'] == 0
    timer.write(15, 0.5, METRICS, 0.7, writer)
    assert writer.scalars['train/step_seconds'] < 0.1 and writer.scalars['train/input_wait'] == 0


def test_the_line_has_the_share_of_the_time_that_was_spent_on_waiting_for_a_program(timer, caplog):
    caplog.set_level('INFO')
    timer.restart(0)
    with timer.phase('compile'):
        time.sleep(0.2)
    timer.write(1, 0.5, METRICS, 0.7, Written())
    timer.write(2, 0.5, METRICS, 0.7, Written())
    waited, none = (float(share) for share in re.findall(r'compile wait (\S+) %', caplog.text))
    assert waited > 50 and none == 0


def test_a_slow_step_is_said_while_it_lasts_with_what_it_waits_for_and_once_it_is_over(timer, caplog):
    fast_steps(timer)
    timer.step(6)
    with timer.phase('input'):
        time.sleep(0.5)
        during = caplog.text
    timer.step(7)
    assert 'step 6 takes' in during and 'waiting for the input' in during
    assert 1 < during.count('step 6 takes') < 6  # at each doubling
    assert 'step 6 took 0.5 s' in caplog.text and 'step 7' not in caplog.text


def test_nothing_is_slow_before_something_is_usual_nor_in_an_evaluation(timer, caplog):
    timer.step(0)
    time.sleep(0.2)
    timer.step(1)
    fast_steps(timer)
    timer.restart(6)
    time.sleep(0.3)
    timer.step(6)
    assert not caplog.text


def test_profiled_steps_are_named_as_a_range():
    assert parse_steps('10:20') == range(10, 20) and not parse_steps('')
    for wrong in ('10', '20:10', '5:5', 'a:b', '-1:4'):
        with pytest.raises(ValueError, match=r'config.profile_steps=.* names no steps: give FIRST:END'):
            parse_steps(wrong)


def test_the_asked_steps_are_traced_and_no_others(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(f'start {folder}'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
    profile = StepProfiler(range(2, 4), tmp_path)
    for step in range(6):
        profile.before(step)
        calls.append(step)
        profile.after(step, ())
    profile.close()
    assert calls == [0, 1, f'start {tmp_path / "profile"}', 2, 3, 'stop', 4, 5]


def test_where_jax_cannot_write_a_trace_is_made_elsewhere_and_brought_there(tmp_path, monkeypatch):
    made = []

    def trace(folder):
        made.append(pathlib.Path(folder))
        (made[0] / 'plugins').mkdir()
        (made[0] / 'plugins' / 'host.xplane.pb').write_bytes(b'trace')

    monkeypatch.setattr(jax.profiler, 'start_trace', trace)
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
    profile = StepProfiler(range(1), tmp_path)
    monkeypatch.setattr(storage, 'is_remote', lambda path: True)
    profile.before(0)
    profile.after(0, ())
    assert (tmp_path / 'profile' / 'plugins' / 'host.xplane.pb').read_bytes() == b'trace'
    assert made[0] != tmp_path / 'profile' and not made[0].exists()
