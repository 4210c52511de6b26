"""A run that is told to stop saves at the step it is at, ends with code 75, and continues to the bit."""

import contextlib
import os
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.checkpoints import best, checksums
from evit_jax.checkpoints.manager import newest_step, read_metadata, read_newest
from evit_jax.metrics import writers
from evit_jax.runtime import preemption as stopping
from evit_jax.training import experiment, loop, results
from tests.helpers import layouts

QUIET = {'checkpoint__every': 100, 'checkpoint__minutes': 0.0}


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed')
    return workdir, layouts.train_here(workdir, **QUIET)


def tell_at(monkeypatch, point, number=signal.SIGTERM, times=1):
    """Sends this process the signal at the `point`-th of the run's points to stop at."""
    check, passed = stopping.PreemptionHandler.check, [0]

    def told(self):
        passed[0] += 1
        if passed[0] == point:
            for _ in range(times):
                os.kill(os.getpid(), number)
        check(self)

    monkeypatch.setattr(stopping.PreemptionHandler, 'check', told)


def assert_same_bits(workdir, want):
    (got, metadata), (expected, _) = read_newest(workdir, 'params'), read_newest(want, 'params')
    assert metadata['next_step'] == layouts.STEPS
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize(('number', 'point', 'saved'), [
    (signal.SIGTERM, 3, 2), (signal.SIGINT, 4, 3),
    (signal.SIGTERM, 6, 4)])  # the points: steps 0 to 4, then the evaluation before step 4
def test_a_run_told_to_stop_saves_there_and_continues_to_the_bit(undisturbed, tmp_path, monkeypatch, number, point,
                                                                saved):
    with monkeypatch.context() as patch:
        tell_at(patch, point, number)
        with pytest.raises(stopping.Preempted) as stopped:
            loop.train(layouts.config_of(**QUIET), tmp_path)
    assert stopped.value.code == 75
    assert newest_step(tmp_path) == saved
    metrics = loop.train(layouts.config_of(**QUIET), tmp_path)
    assert_same_bits(tmp_path, undisturbed[0])
    assert {name: metrics[name] for name in ('top1', 'loss')} == {name: undisturbed[1][name]
                                                                 for name in ('top1', 'loss')}
    evaluated = [record['step'] for record in writers.read_metrics(tmp_path / 'metrics.jsonl') if 'eval/top1' in record]
    assert evaluated == [4, 8, 10]


def test_a_run_told_to_stop_in_its_last_evaluation_has_only_that_to_do_again(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, contextlib.suppress(stopping.Preempted):
        patch.setattr(results, 'evaluate_state', lambda *_: os.kill(os.getpid(), signal.SIGTERM) or _[-1].check())
        loop.train(layouts.config_of(**QUIET), tmp_path)
    assert newest_step(tmp_path) == layouts.STEPS
    assert loop.train(layouts.config_of(**QUIET), tmp_path)['top1'] == undisturbed[1]['top1']


def test_a_second_interrupt_ends_at_once_and_a_second_preemption_does_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        tell_at(patch, 3, signal.SIGTERM, times=2)
        with pytest.raises(stopping.Preempted):
            loop.train(layouts.config_of(**QUIET), tmp_path / 'twice')
    with monkeypatch.context() as patch:
        tell_at(patch, 3, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            loop.train(layouts.config_of(**QUIET), tmp_path / 'at once')
    assert newest_step(tmp_path / 'twice') == 2
    assert newest_step(tmp_path / 'at once') is None


@pytest.mark.parametrize(('error', 'preemption'), [(KeyError, signal.SIG_DFL), (stopping.Preempted, signal.SIG_IGN)])
def test_the_handlers_of_before_are_back_afterwards_but_a_stopped_run_heeds_no_more_preemption(error, preemption):
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))}
    with pytest.raises(error), stopping.PreemptionHandler():
        raise error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is preemption
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_best_evaluation_is_kept_apart_and_is_a_workdir(undisturbed, tmp_path, monkeypatch):
    scores = iter([0.5, 0.5, 0.97, 0.97, 0.6, 0.6])  # top1 and top1_ema of three evaluations
    evaluate = results.evaluate_params

    def scored(*arguments, **how):
        found = evaluate(*arguments, **how)
        return found._replace(metrics=found.metrics | {'top1': next(scores)})

    with monkeypatch.context() as patch:
        patch.setattr(results, 'evaluate_params', scored)
        loop.train(layouts.config_of(**QUIET), tmp_path)
    apart = tmp_path / best.BEST_FOLDER
    assert newest_step(apart) == 8 and os.listdir(apart / 'checkpoints') == ['8']
    assert read_metadata(apart)['best'] == {'top1': 0.97}
    assert loop.evaluate_workdir(layouts.config_of(), apart)['top1'] == next(
        record['eval/top1'] for record in writers.read_metrics(undisturbed[0] / 'metrics.jsonl')
        if record['step'] == 8)
    loop.train(layouts.config_of(**QUIET), tmp_path)  # evaluates once more, to less
    assert newest_step(apart) == 8


def test_where_the_best_could_not_be_written_the_next_one_is_compared_with_what_is_there(tmp_path, monkeypatch):
    (tmp_path / 'config.json').write_text('{}')
    kept, laid = best.BestCheckpoint(tmp_path, 'top1'), experiment.setup(layouts.config_of())
    state = laid.new_state()
    for step, value, room in ((1, 0.5, True), (2, 0.9, False), (3, 0.4, True), (4, 0.7, True)):
        with monkeypatch.context() as patch:
            if not room:
                patch.setattr(checksums, 'write', mock.Mock(side_effect=OSError('no space left on device')))
            kept.offer(state._replace(step=jnp.int32(step)), {'top1': value}, laid.metadata)
            assert kept._checkpoints.latest() == {1: 1, 2: 1, 3: 1, 4: 4}[step]
    kept.close()
    assert read_metadata(tmp_path / 'best')['best'] == {'top1': 0.7}


def test_nothing_is_kept_apart_where_no_metric_is_named(tmp_path):
    loop.train(layouts.config_of(checkpoint__best='', epochs=1), tmp_path)
    assert not (tmp_path / best.BEST_FOLDER).exists()


def test_a_run_saves_when_its_minutes_are_over(tmp_path):
    loop.train(layouts.config_of(checkpoint__every=100, checkpoint__minutes=1e-9, checkpoint__keep=100,
                                 log__every=3), tmp_path)
    assert sorted(map(int, os.listdir(tmp_path / 'checkpoints'))) == [3, 6, 9, 10]
