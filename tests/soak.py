"""Kills and resumes short trainings a given number of times: python -m tests.soak --kills=200

A training is killed at a random moment: by SIGKILL at a step, during a save or during the start, or by SIGTERM. Some
kills also damage the newest checkpoint. Every training that ends must have the bits of an undisturbed training.
"""

import argparse
import collections
import itertools
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

from evit_jax.checkpoints import checksums
from evit_jax.runtime import preemption
from tests.helpers import faults

STEPS = 160
RUN = {'epochs': 20}
PROBABILITIES = {'step': 0.35, 'save': 0.35, 'start': 0.1, 'stop': 0.2}
DAMAGE_PROBABILITY = 0.12  # probability that a kill also damages the newest checkpoint
NAMES = {'step': 'SIGKILL at a step', 'save': 'SIGKILL in a save', 'start': 'SIGKILL at the start', 'stop': 'SIGTERM'}


class Soak:
    """Runs trainings one after the other until the number of kills is reached."""

    def __init__(self, folder, kills, seed):
        self._folder, self._num_kills, self._rng = pathlib.Path(folder), kills, np.random.default_rng(seed)
        self._start_time, self._runs, self._damaged = time.monotonic(), 0, 0
        self._killed = collections.defaultdict(list)  # key: kind of kill

    def kills(self):
        """Returns the number of kills so far."""
        return sum(map(len, self._killed.values()))

    def run(self):
        """Runs until the number of kills is reached. Returns a table of the kills."""
        faults.finish(self._folder / 'undisturbed', **RUN)
        print(f'undisturbed: {STEPS} steps in {time.monotonic() - self._start_time:.0f} s', flush=True)
        self._start_time = time.monotonic()
        while self.kills() < self._num_kills:
            self._train_through_kills(self._folder / f'run_{self._runs}')
            self._runs += 1
        return self._table()

    def _train_through_kills(self, workdir):
        """Trains to the end, and kills and resumes the training on the way."""
        damaged, training = 0, faults.Training(workdir, **RUN)
        while self.kills() < self._num_kills:
            killed = faults.kill(training, self._rng, self._rng.choice([*PROBABILITIES], p=[*PROBABILITIES.values()]))
            if killed is None:
                break
            if killed.kind == 'stop' and killed.kept < STEPS:
                assert killed.code == preemption.EXIT_CODE and killed.kept == killed.step, (
                    killed, training.log()[-3000:])
            self._killed[killed.kind].append(killed)
            if self._rng.random() < DAMAGE_PROBABILITY:
                damaged += damage(workdir, self._rng)
            self._print_progress()
            training = faults.Training(workdir, **RUN)
        assert training.wait() == [0], training.log()[-3000:]
        faults.assert_same_end(workdir, self._folder / 'undisturbed')
        unreadable = workdir / 'unreadable_checkpoints'
        assert len([*unreadable.iterdir()] if unreadable.exists() else []) == damaged
        self._damaged += damaged

    def _print_progress(self):
        done, seconds = self.kills(), time.monotonic() - self._start_time
        if done % 10 == 0:
            print(f'{done} of {self._num_kills} kills, {self._in_saves()} of them in saves; {self._runs} runs ended '
                  f'with the same bits; {60 * done / seconds:.1f} kills a minute, ETA '
                  f'{(self._num_kills - done) * seconds / done / 60:.0f} min', flush=True)

    def _in_saves(self):
        return sum(killed.saving for killed in itertools.chain(*self._killed.values()))

    def _table(self):
        rows = [('', 'kills', 'save interrupted', 'steps lost: mean', 'max')]
        for kind in (*NAMES, 'all'):
            kills = self._killed[kind] if kind in NAMES else [*itertools.chain(*self._killed.values())]
            steps = [max(killed.step - killed.kept, 0) for killed in kills] or [0]
            rows.append((NAMES.get(kind, kind), str(len(kills)), str(sum(killed.saving for killed in kills)),
                         f'{np.mean(steps):.1f}', str(max(steps))))
        lines = ['  '.join(f'{cell:<20}' if column == 0 else f'{cell:>16}' for column, cell in enumerate(row))
                 for row in rows]
        return '\n'.join([*lines, f'{self._damaged} checkpoints were damaged: each was refused, and the one before it '
                          f'was used; {self._runs} runs of {STEPS} steps, saved at every 5th step, ended with the '
                          f'bits of the undisturbed run; {(time.monotonic() - self._start_time) / 60:.1f} min'])


def damage(workdir, rng):
    """Flips a bit of a random file of the newest checkpoint, or truncates the file.

    Returns:
      True if a file was damaged. False if there are fewer than two checkpoints, or one is damaged already.
    """
    folders = sorted((path for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()),
                     key=lambda path: int(path.name))
    if len(folders) < 2 or not all(map(is_whole, folders)):
        return False
    files = [path for path in folders[-1].rglob('*') if path.is_file() and path.parent != folders[-1]]
    damage_file = faults.flip if rng.random() < 0.5 else faults.cut
    damage_file(files[rng.integers(len(files))], rng)
    return True


def is_whole(folder):
    try:
        return checksums.check(folder)
    except ValueError:
        return False


def main():
    parser = argparse.ArgumentParser(prog='python -m tests.soak', description=__doc__.partition('\n')[0])
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='evit_jax_soak_') as folder:
        os.environ |= {'JAX_COMPILATION_CACHE_DIR': f'{folder}/programs',
                       'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
        try:
            print(Soak(folder, options.kills, options.seed).run())
        except AssertionError as error:
            sys.exit(f'error: a run did not continue correctly after a fault: {error}')


if __name__ == '__main__':
    main()
