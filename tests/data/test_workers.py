"""Tests of worker processes: their batches equal those of a thread, they exit, and their memory is bounded."""

import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from evit_jax.data import pipeline
from evit_jax.data.order import SampleOrder
from tests.helpers.toys import Broken, Jitter, Numbered, Plain, assert_same, evaluate, train


@pytest.mark.parametrize('num_workers', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batches_of_workers_equal_those_of_the_thread(num_workers):
    assert_same(train(Broken(10), 1, repeats=3, num_workers=num_workers), train(Broken(10), 1, repeats=3))


def test_eval_batches_more_workers_than_batches_equal_those_of_the_thread():
    assert_same(evaluate(Broken(5, masked=True), num_workers=3), evaluate(Broken(5, masked=True)))


@pytest.mark.parametrize('num_workers', [0, 1])
def test_batches_closed_cannot_be_iterated(num_workers):
    batches = pipeline.train_batches(Numbered(9), SampleOrder(3, epochs=100, seed=0), Jitter(),
                                     num_workers=num_workers)
    next(batches)
    batches.close()
    with pytest.raises(ValueError, match='closed'):
        next(batches)


class Deadly(Numbered):
    """Kills the worker that reads example 5, like the kernel when memory is short."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize('num_workers', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_batches_killed_worker_raises_within_seconds(num_workers):
    batches = pipeline.eval_batches(Deadly(8), batch_size=1, transform=Plain(), num_workers=num_workers)
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match=r'input died with exit code -9 \(killed.*data.workers'):
        list(batches)
    batches.close()
    assert time.monotonic() - begin < 30


def test_batches_workers_exit_when_the_parent_is_killed(tmp_path):
    code = ('import sys, time, multiprocessing\n'
            'from tests.helpers.toys import Numbered, Plain, pipeline\n'
            'if __name__ == "__main__":\n'
            '  batches = pipeline.eval_batches(Numbered(999), batch_size=1, transform=Plain(), num_workers=2)\n'
            '  next(batches)\n'
            '  print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n'
            '  time.sleep(60)\n')
    script = tmp_path / 'parent.py'
    script.write_text(code)
    root = pathlib.Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, str(script)], cwd=root, env=os.environ | {'PYTHONPATH': str(root)},
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while (left := [pid for pid in workers if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_batches_workers_ignore_a_sigterm_to_the_process_group():
    batches = pipeline.eval_batches(Numbered(40), batch_size=4, transform=Plain(), num_workers=2)
    try:
        got = [next(batches), next(batches)]  # one from each worker, so both have started
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
        got += batches
    finally:
        batches.close()
    assert_same(got, evaluate(Numbered(40)))


@pytest.mark.slow
def test_run_with_workers_stopped_by_sigterm_leaves_no_shared_memory(tmp_path):
    layout = {'data__workers': 2, 'epochs': 5000, 'checkpoint__every': 10**6, 'log__pictures': 0, 'batch_size': 16}
    with open(tmp_path / 'log', 'w') as log:
        run = subprocess.Popen([sys.executable, '-m', 'tests.helpers.layouts'], stdout=log, stderr=log,
                               start_new_session=True, cwd=pathlib.Path(__file__).parents[2],
                               env=os.environ | {'LAYOUT': json.dumps([str(tmp_path / 'run'), layout])})
    metrics, deadline = tmp_path / 'run/metrics.jsonl', time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count('train/loss') > 5) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    assert run.wait(100) == 75
    said = (tmp_path / 'log').read_text()
    assert 'the same command continues from there' in said and 'leaked' not in said


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = pathlib.Path(f'/proc/{pid}/stat')
    return not state.exists() or state.read_text().rpartition(')')[2].split()[0] != 'Z'


class Noted(Numbered):
    """Appends each read example to a file, from any process."""

    def __init__(self, size, file):
        super().__init__(size)
        self.file = file

    def __getitem__(self, index):
        with open(self.file, 'a') as file:
            file.write('x')
        return super().__getitem__(index)


@pytest.mark.parametrize('num_workers', [0, 2])
def test_batches_prepared_ahead_are_at_most_max_held(num_workers, tmp_path):
    file = tmp_path / 'read'
    batches = pipeline.eval_batches(Noted(99, file), batch_size=1, transform=Plain(), num_workers=num_workers)
    for _ in range(3):
        next(batches)
    before, made, deadline = -1, 0, time.monotonic() + 20
    while (made > before or made == 3) and time.monotonic() < deadline:  # until the workers are idle
        time.sleep(0.5)
        before, made = made, file.stat().st_size
    batches.close()
    assert 3 < made <= 2 + batches.max_held < 20


def test_train_batches_logs_the_memory_of_the_batches(caplog):
    with caplog.at_level('INFO'):
        train(4, transform=Jitter(224))
    assert 'input: a thread holds at most 3 batches of 0.6 MB, 2 MB in total' in caplog.text
