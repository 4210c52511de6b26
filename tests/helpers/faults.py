"""A short training in another process, faults to inject into it, and a comparison of its final state."""

import json
import os
import pathlib
import signal
import time
from typing import NamedTuple

import numpy as np

from evit_jax.checkpoints import checksums, manager
from evit_jax.metrics import writers
from tests.helpers import layouts

# The steps are cheap and every fifth one saves, so that a random moment is often near a save.
SETTINGS = {'processes': 1, 'devices': 1, 'batch_size': 16, 'epochs': 10, 'log__eval_epochs': 2.5, 'log__every': 1,
            'log__pictures': 0, 'checkpoint__every': 5}
STEPS = 80
DEVICES = 8  # number of devices of a test process
KINDS = ('step', 'save', 'start', 'stop')
_POLL = 0.01  # seconds
_TIMEOUT = 120


class Killed(NamedTuple):
    """The state of a run when its process was killed."""

    kind: str
    code: int      # exit code
    step: int      # last step whose loss was written; 0: none
    kept: int      # step of the newest checkpoint; 0: none
    saving: bool   # a save was interrupted


class Training:
    """A running training, in one process or several."""

    def __init__(self, workdir, **changes):
        self.workdir = pathlib.Path(workdir)
        self._metrics = self.workdir / writers.METRICS_FILE
        self._before = self._metrics.stat().st_size if self._metrics.exists() else 0
        self.processes = layouts.start(workdir, **SETTINGS | changes)

    def is_running(self):
        return all(process.poll() is None for process in self.processes)

    def wait(self, seconds=_TIMEOUT):
        return layouts.wait(self.processes, seconds)

    def step(self):
        """Returns the last step whose loss was written since the start; 0 if there is none."""
        if not self._metrics.exists():
            return 0
        with self._metrics.open('rb') as file:
            file.seek(max(self._before, os.fstat(file.fileno()).st_size - 4000))
            lines = file.read().split(b'\n')[:-1]
        records = [json.loads(line) for line in lines if line.startswith(b'{')]
        return max((record.get('step', 0) for record in records), default=0)

    def until(self, condition, name):
        """Waits for a condition. Returns True if the training was still running when the condition became true."""
        deadline = time.monotonic() + _TIMEOUT
        while not condition():
            if not self.is_running():
                return False
            assert time.monotonic() < deadline, f'{name} took more than {_TIMEOUT} s: {self.log()}'
            time.sleep(_POLL)
        return self.is_running()

    def until_steps(self, count):
        """Waits until `count` more steps are done. Returns True if the training was still running then."""
        if not self.until(self.step, 'a step'):
            return False
        last = self.step() + count
        return self.until(lambda: self.step() >= last, f'step {last}')

    def log(self, process=0):
        """Returns the log of a process."""
        return pathlib.Path(f'{self.workdir}.{process}.log').read_text()

    def errors(self, process=0):
        """Returns the error lines for the user in the log of a process."""
        return [line for line in self.log(process).splitlines() if line.startswith('error: ')]

    def end(self, signal_number=signal.SIGKILL):
        """Sends a signal to the first process and waits for it. Returns its exit code."""
        self.processes[0].send_signal(signal_number)
        return self.processes[0].wait(_TIMEOUT)


def kill(training, rng, kind):
    """Ends a training at a random moment.

    Args:
      kind: one of KINDS. 'step': SIGKILL some steps after the first; 'save': SIGKILL during a save; 'start': SIGKILL
        before or shortly after the first step; 'stop': SIGTERM some steps after the first.

    Returns:
      The state of the run, or None if it ended before the kill.
    """
    before = unfinished(training.workdir)
    if kind == 'start':
        time.sleep(rng.uniform(0, 4))
    elif not training.until_steps(rng.integers(1, 12)):
        return None
    if kind == 'save':
        before = unfinished(training.workdir)
        if not training.until(lambda: unfinished(training.workdir) - before, 'a save'):
            return None
        time.sleep(rng.uniform(0, 0.1))
    elif kind != 'start':
        time.sleep(rng.uniform(0, 0.2))
    if not training.is_running():
        return None
    code = training.end(signal.SIGTERM if kind == 'stop' else signal.SIGKILL)
    return Killed(kind, code, training.step(), manager.newest_step(training.workdir) or 0,
                  bool(unfinished(training.workdir) - before))


def unfinished(workdir):
    """Returns the folder names of saves that are running or were interrupted."""
    folder = pathlib.Path(workdir) / 'checkpoints'
    return {path.name for path in folder.glob('*.orbax-checkpoint-tmp*')}


def kept(workdir):
    """Returns the steps of the checkpoints, after checking their checksums."""
    steps = sorted(int(path.name) for path in (pathlib.Path(workdir) / 'checkpoints').glob('*') if path.name.isdigit())
    assert all(checksums.check(pathlib.Path(workdir) / 'checkpoints' / str(step)) for step in steps)
    return steps


def chunk(checkpoint):
    """Returns the largest file of a checkpoint."""
    return max((path for path in (checkpoint / 'state').rglob('*') if path.is_file()),
               key=lambda path: (path.stat().st_size, path.name))


def flip(file, rng):
    """Flips one bit."""
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    file.write_bytes(data)


def cut(file, rng):
    """Truncates a file."""
    os.truncate(file, rng.integers(file.stat().st_size))


def finish(workdir, **changes):
    """Trains to the end. Returns the log."""
    training = Training(workdir, **changes)
    codes = training.wait()
    assert not any(codes), training.log()[-3000:]
    return training.log()


def finish_here(workdir, **changes):
    """Trains to the end in this process, on its devices: the equal of a `Training` in one process with DEVICES."""
    settings = SETTINGS | changes
    for key in ('processes', 'devices'):
        settings.pop(key)
    layouts.train_here(workdir, **settings)


def assert_same_end(workdir, expected):
    """Asserts that parameters, EMA and the losses of all steps have the bits of another run."""
    for field in ('params', 'ema'):
        (arrays, metadata), (expected_arrays, expected_metadata) = (
            manager.read_newest(folder, field) for folder in (workdir, expected))
        assert metadata['next_step'] == expected_metadata['next_step']
        assert arrays.keys() == expected_arrays.keys() and arrays
        for name, array in expected_arrays.items():
            np.testing.assert_array_equal(arrays[name], array, err_msg=f'{field}.{name}')
    assert losses(workdir) == losses(expected)


def losses(workdir):
    """Returns the losses by step."""
    return {record['step']: record['train/loss']
            for record in writers.read_metrics(pathlib.Path(workdir) / writers.METRICS_FILE) if 'train/loss' in record}
