"""A run stopped by a signal saves its current step and ends with code 75. A resumed run is bit-identical."""

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
from evit_jax.runtime import preemption
from evit_jax.training import experiment, loop, results
from tests.helpers import layouts
from tests.helpers.signals import signal_at_check

QUIET = {'checkpoint__every': 100, 'checkpoint__minutes': 0.0, 'log__pictures': 0}


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('undisturbed')
    return workdir, layouts.train_here(workdir, **QUIET)


def assert_same_bits(workdir, expected_workdir):
    (actual, metadata), (expected, _) = read_newest(workdir, 'params'), read_newest(expected_workdir, 'params')
    assert metadata['next_step'] == layouts.STEPS
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(('number', 'check_number', 'saved'), [
    (signal.SIGTERM, 3, 2), pytest.param(signal.SIGINT, 4, 3, marks=pytest.mark.slow),
    (signal.SIGTERM, 6, 4)])  # the checks are at steps 0 to 4, then in the evaluation before step 4
def test_train_stopped_by_a_signal_saves_and_continues_to_the_bit(undisturbed, tmp_path, monkeypatch, number,
                                                                  check_number, saved):
    with monkeypatch.context() as patch:
        signal_at_check(patch, check_number, number)
        with pytest.raises(preemption.Preempted) as stopped:
            loop.train(layouts.config_of(**QUIET), tmp_path)
    assert stopped.value.code == 75
    assert newest_step(tmp_path) == saved
    metrics = loop.train(layouts.config_of(**QUIET), tmp_path)
    assert_same_bits(tmp_path, undisturbed[0])
    assert {name: metrics[name] for name in ('top1', 'loss')} == {name: undisturbed[1][name]
                                                                 for name in ('top1', 'loss')}
    evaluated = [record['step'] for record in writers.read_metrics(tmp_path / 'metrics.jsonl') if 'eval/top1' in record]
    assert evaluated == [4, 8, 10]


def test_train_stopped_in_the_last_evaluation_repeats_only_that(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, contextlib.suppress(preemption.Preempted):
        patch.setattr(results, 'evaluate_state', lambda *_: os.kill(os.getpid(), signal.SIGTERM) or _[-1].check())
        loop.train(layouts.config_of(**QUIET), tmp_path)
    assert newest_step(tmp_path) == layouts.STEPS
    assert loop.train(layouts.config_of(**QUIET), tmp_path)['top1'] == undisturbed[1]['top1']


def test_train_second_interrupt_ends_at_once_and_second_preemption_does_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        signal_at_check(patch, 3, signal.SIGTERM, times=2)
        with pytest.raises(preemption.Preempted):
            loop.train(layouts.config_of(**QUIET), tmp_path / 'twice')
    with monkeypatch.context() as patch:
        signal_at_check(patch, 3, signal.SIGINT, times=2)
        with pytest.raises(KeyboardInterrupt):
            loop.train(layouts.config_of(**QUIET), tmp_path / 'at once')
    assert newest_step(tmp_path / 'twice') == 2
    assert newest_step(tmp_path / 'at once') is None


@pytest.mark.parametrize(('error', 'sigterm_handler'), [
    (KeyError, signal.SIG_DFL), (preemption.Preempted, signal.SIG_IGN)])
def test_handler_at_its_end_restores_the_handlers_but_ignores_sigterm_after_a_stop(error, sigterm_handler):
    before = {number: signal.signal(number, handler) for number, handler in (
        (signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))}
    with pytest.raises(error), preemption.PreemptionHandler():
        raise error
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is sigterm_handler
    for number, handler in before.items():
        signal.signal(number, handler)


def test_best_checkpoint_is_in_a_separate_folder_that_is_a_workdir(undisturbed, tmp_path, monkeypatch):
    scores = iter([0.5, 0.5, 0.97, 0.97, 0.6, 0.6])  # top1 and top1_ema of three evaluations
    evaluate = results.evaluate_params

    def scored(*arguments, **how):
        result = evaluate(*arguments, **how)
        return result._replace(metrics=result.metrics | {'top1': next(scores)})

    with monkeypatch.context() as patch:
        patch.setattr(results, 'evaluate_params', scored)
        loop.train(layouts.config_of(**QUIET), tmp_path)
    folder = tmp_path / best.BEST_FOLDER
    assert newest_step(folder) == 8 and os.listdir(folder / 'checkpoints') == ['8']
    assert read_metadata(folder)['best'] == {'top1': 0.97}
    assert loop.evaluate_workdir(layouts.config_of(), folder)['top1'] == next(
        record['eval/top1'] for record in writers.read_metrics(undisturbed[0] / 'metrics.jsonl')
        if record['step'] == 8)
    loop.train(layouts.config_of(**QUIET), tmp_path)  # evaluates once more, with a lower accuracy
    assert newest_step(folder) == 8


def test_best_checkpoint_after_a_failed_save_is_compared_with_the_one_on_disk(tmp_path, monkeypatch):
    (tmp_path / 'config.json').write_text('{}')
    checkpoint, run = best.BestCheckpoint(tmp_path, 'top1'), experiment.setup(layouts.config_of())
    state = run.new_state()
    for step, value, room in ((1, 0.5, True), (2, 0.9, False), (3, 0.4, True), (4, 0.7, True)):
        with monkeypatch.context() as patch:
            if not room:
                patch.setattr(checksums, 'write', mock.Mock(side_effect=OSError('no space left on device')))
            checkpoint.offer(state._replace(step=jnp.int32(step)), {'top1': value}, run.metadata)
            assert checkpoint._checkpoints.latest() == {1: 1, 2: 1, 3: 1, 4: 4}[step]
    checkpoint.close()
    assert read_metadata(tmp_path / 'best')['best'] == {'top1': 0.7}


def test_best_checkpoint_without_metric_writes_no_folder(tmp_path):
    checkpoint = best.BestCheckpoint(tmp_path, '')
    checkpoint.offer(None, {'top1': 1.0}, {})
    checkpoint.close()
    assert not [*tmp_path.iterdir()]


def test_train_saves_after_the_configured_minutes(tmp_path):
    loop.train(layouts.config_of(checkpoint__every=100, checkpoint__minutes=1e-9, checkpoint__keep=100,
                                 log__every=3), tmp_path)
    assert sorted(map(int, os.listdir(tmp_path / 'checkpoints'))) == [3, 6, 9, 10]
