"""Kills, damaged checkpoints and full disks during training. A resumed run equals an undisturbed one bit for bit."""

import functools
import logging
import os
import pathlib
import resource
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from evit_jax.metrics import writers
from evit_jax.runtime import preemption
from tests.helpers import faults, layouts, poison
from tests.helpers.signals import signal_at_check

linux = pytest.mark.skipif(sys.platform != 'linux', reason='prlimit and /proc exist only on Linux')


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
    """Returns a function from changed settings to the workdir of an undisturbed run."""
    folder, workdirs = tmp_path_factory.mktemp('undisturbed'), {}

    def run(**changes):
        name = str(sorted((faults.SETTINGS | changes).items()))
        if name not in workdirs:
            workdirs[name] = folder / str(len(workdirs))
            faults.finish(workdirs[name], **changes)
        return workdirs[name]

    return run


@pytest.fixture(scope='module')
def undisturbed_here(tmp_path_factory):
    """Returns a function from a number of epochs to the workdir of an undisturbed run in this process."""
    folder = tmp_path_factory.mktemp('undisturbed_here')

    @functools.cache
    def run(epochs):
        faults.finish_here(folder / str(epochs), epochs=epochs)
        return folder / str(epochs)

    return run


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Workdir of a finished run with three checkpoints, trained in this process."""
    workdir = tmp_path_factory.mktemp('saved')
    layouts.train_here(workdir, checkpoint__every=3)
    assert faults.kept(workdir) == [6, 9, 10]
    return workdir


@pytest.mark.parametrize(('kinds', 'epochs'), [
    (('step', 'save'), 10),
    pytest.param(('step', 'save', 'start', 'save', 'step') * 4, 60, marks=pytest.mark.slow)])
def test_train_killed_at_random_moments_and_in_saves_resumes_to_the_bit(undisturbed_here, tmp_path, kinds, epochs):
    rng, lost = np.random.default_rng(len(kinds)), []
    for kind in kinds:
        training = faults.Training(tmp_path / 'run', devices=faults.DEVICES, epochs=epochs)
        lost.append(faults.kill(training, rng, kind))
    faults.finish_here(tmp_path / 'run', epochs=epochs)
    print(*lost, sep='\n')
    assert None not in lost, 'the run ended before it was killed'
    assert sum(one.saving for one in lost) >= kinds.count('save') / 2
    assert not faults.unfinished(tmp_path / 'run')
    faults.assert_same_end(tmp_path / 'run', undisturbed_here(epochs))


@pytest.mark.slow
def test_train_preempted_at_random_moments_has_saved_and_resumes_to_the_bit(undisturbed, tmp_path):
    rng, workdir = np.random.default_rng(0), tmp_path / 'run'
    for moment in ('step', 'evaluation', 'again and again'):
        training = faults.Training(workdir)
        if moment == 'evaluation':
            assert training.until(lambda training=training: training.step() == 20, 'step 20')
        else:
            assert training.until_steps(rng.integers(1, 9))
            time.sleep(rng.uniform(0, 0.1))
        if moment == 'again and again':
            while training.is_running():
                training.processes[0].terminate()
                time.sleep(0.005)
        assert training.end(signal.SIGTERM) == preemption.EXIT_CODE, training.log()
        assert faults.kept(workdir)[-1] == training.step()
        assert not faults.unfinished(workdir)
        if moment == 'evaluation':
            assert training.step() == 20
            assert not any('eval/top1' in record for record in writers.read_metrics(workdir / writers.METRICS_FILE))
    faults.finish(workdir)
    faults.assert_same_end(workdir, undisturbed())


@pytest.mark.slow
@pytest.mark.parametrize('first', [0, 1])
def test_train_with_one_process_of_two_preempted_saves_both_and_resumes_to_the_bit(undisturbed, tmp_path, first):
    training = faults.Training(tmp_path / 'run', processes=2)
    assert training.until_steps(12)
    training.processes[first].terminate()
    assert training.wait(60) == [preemption.EXIT_CODE] * 2
    assert faults.kept(tmp_path / 'run')[-1] == training.step()
    faults.finish(tmp_path / 'run', processes=2)
    faults.assert_same_end(tmp_path / 'run', undisturbed(processes=2))


@pytest.mark.slow
def test_train_preempted_or_stopped_between_nonfinite_steps_resumes_to_the_bit(tmp_path, monkeypatch):
    poison.poison(monkeypatch)
    settings = poison.settings()
    layouts.train_here(tmp_path / 'undisturbed', nonfinite='skip', **settings)
    with monkeypatch.context() as patch, pytest.raises(preemption.Preempted):
        signal_at_check(patch, 5)
        layouts.train_here(tmp_path / 'run', nonfinite='skip', **settings)
    saved = faults.kept(tmp_path / 'run')
    first, *_, last = poison.poisoned_steps()
    assert first < saved[-1] < last
    with pytest.raises(FloatingPointError, match=f'not finite.*; the last good checkpoint is that of step {saved[-1]}'):
        layouts.train_here(tmp_path / 'run', nonfinite='stop', checkpoint__every=100, **settings)
    assert faults.kept(tmp_path / 'run') == saved
    layouts.train_here(tmp_path / 'run', nonfinite='skip', **settings)
    faults.assert_same_end(tmp_path / 'run', tmp_path / 'undisturbed')


@pytest.mark.slow
@pytest.mark.parametrize('first', [0, 1])
def test_train_with_one_process_of_two_killed_resumes_to_the_bit(undisturbed, tmp_path, first):
    training = faults.Training(tmp_path / 'run', processes=2)
    assert training.until_steps(12)
    training.processes[first].kill()
    assert training.wait(60)[1 - first] != 0
    faults.finish(tmp_path / 'run', processes=2)
    faults.assert_same_end(tmp_path / 'run', undisturbed(processes=2))


def test_train_after_a_flipped_bit_and_a_cut_file_resumes_from_the_last_whole_checkpoint(saved, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    workdir, rng = tmp_path / 'run', np.random.default_rng(0)
    shutil.copytree(saved, workdir)
    first, second, third = faults.kept(workdir)
    faults.flip(flipped := faults.chunk(workdir / 'checkpoints' / str(third)), rng)
    faults.cut(cut := faults.chunk(workdir / 'checkpoints' / str(second)), rng)
    layouts.train_here(workdir, checkpoint__every=3)
    log = caplog.text
    for step, file, what in ((third, flipped, 'holds other bytes'), (second, cut, r'has \d+ bytes, \d+ were written')):
        assert f'checkpoint of step {step} cannot be read, trying the previous one: state/' in log
        assert f'{file.name} {what.split()[0]}' in log
    assert f'continuing at step {first} of {layouts.STEPS}' in log
    faults.assert_same_end(workdir, saved)


def test_train_with_every_checkpoint_damaged_is_refused_and_keeps_them(saved, tmp_path):
    workdir, rng = tmp_path / 'run', np.random.default_rng(0)
    shutil.copytree(saved, workdir)
    for step in (steps := faults.kept(workdir)):
        faults.flip(faults.chunk(workdir / 'checkpoints' / str(step)), rng)
    with pytest.raises(ValueError, match=r'none of the checkpoints of steps .* can be read; they were moved to'):
        layouts.train_here(workdir)
    assert sorted(int(path.name) for path in (workdir / 'unreadable_checkpoints').iterdir()) == steps


@pytest.mark.slow
def test_train_started_twice_in_one_workdir_refuses_one_and_the_other_resumes_to_the_bit(undisturbed, tmp_path):
    workdir = tmp_path / 'run'
    twice = [faults.Training(workdir), faults.Training(workdir)]
    layouts.until(lambda: not all(training.is_running() for training in twice), 120)
    refused, other = sorted(twice, key=lambda training: training.is_running())
    assert refused.wait() == [2]
    (error,) = refused.errors()
    assert f'workdir {workdir} is in use by another run' in error
    assert other.until_steps(7)
    other.end()
    faults.finish(workdir)
    faults.assert_same_end(workdir, undisturbed())


def limit_files(training, size):
    """Limits the size of the files of a running process, in bytes, as a full disk does."""
    resource.prlimit(training.processes[0].pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


FULL = 150_000  # bytes: larger than metrics, log and pictures, smaller than the arrays


@linux
def test_train_on_a_full_disk_continues_and_saves_again_when_there_is_room(undisturbed_here, tmp_path):
    training = faults.Training(tmp_path / 'run', devices=faults.DEVICES, checkpoint__best='')
    assert training.until_steps(12)
    limit_files(training, FULL)
    assert training.until(lambda: training.log().count('could not be written') >= 2, 'a failed save')
    before = faults.kept(tmp_path / 'run')
    limit_files(training, resource.RLIM_INFINITY)
    assert training.wait() == [0], training.log()
    assert 'File too large; the run continues without it' in training.log()
    assert faults.kept(tmp_path / 'run')[0] > before[-1]
    assert not faults.unfinished(tmp_path / 'run')
    faults.assert_same_end(tmp_path / 'run', undisturbed_here(faults.SETTINGS['epochs']))


@linux
@pytest.mark.slow
def test_train_on_a_disk_that_stays_full_ends_with_one_line_and_a_usable_checkpoint(undisturbed, tmp_path):
    changes = {'checkpoint__best': '', 'checkpoint__every': 20}
    training = faults.Training(tmp_path / 'run', **changes)
    assert training.until(lambda: training.step() > 41, 'step 41')
    limit_files(training, FULL)
    assert training.wait() == [2]
    before = faults.kept(tmp_path / 'run')
    assert before in ([20, 40], [20, 40, 60])  # [20, 40, 60] if the limit was set late
    assert 'Event loop is closed' not in training.log()
    assert training.errors() == [
        f'error: the checkpoint of step {faults.STEPS} could not be written: File too large; the newest is that of '
        f"step {before[-1]}. Make room in {tmp_path / 'run' / 'checkpoints'}, then start again"]
    faults.finish(tmp_path / 'run', **changes)
    faults.assert_same_end(tmp_path / 'run', undisturbed())


def workers_of(training):
    """Returns the ids of the data workers of a training."""
    parent = training.processes[0].pid
    return [int(child) for thread in pathlib.Path(f'/proc/{parent}/task').iterdir()
            for child in (thread / 'children').read_text().split()
            if b'spawn_main' in pathlib.Path(f'/proc/{child}/cmdline').read_bytes()]


@pytest.mark.slow
@linux
def test_train_with_a_data_worker_killed_ends_with_one_line_and_resumes_to_the_bit(undisturbed, tmp_path):
    training = faults.Training(tmp_path / 'run', data__workers=2)
    assert training.until_steps(7)
    workers = workers_of(training)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert training.wait() == [2]
    (error,) = training.errors()
    assert 'input died with exit code -9 (killed' in error
    faults.finish(tmp_path / 'run')
    faults.assert_same_end(tmp_path / 'run', undisturbed())
