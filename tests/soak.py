"""Kills a short training again and again until it has been killed often enough: python -m tests.soak --kills=200

Each life of a run ends at a random moment: with SIGKILL at some step, in a save or while it starts, or with SIGTERM; at
times the newest checkpoint is damaged as well. Every run that came to its end must have the bits of an undisturbed one.
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
SHARES = {'step': 0.35, 'save': 0.35, 'start': 0.1, 'stop': 0.2}
DAMAGED = 0.12  # share of the ends after which the newest checkpoint is damaged too
NAMES = {'step': 'SIGKILL at a step', 'save': 'SIGKILL in a save', 'start': 'SIGKILL at the start', 'stop': 'SIGTERM'}


class Soak:
    """One run after the other, until there have been enough kills."""

    def __init__(self, folder, kills, seed):
        self._folder, self._wanted, self._rng = pathlib.Path(folder), kills, np.random.default_rng(seed)
        self._begin, self._runs, self._damaged = time.monotonic(), 0, 0
        self._lost = collections.defaultdict(list)  # what was lost, by kind of end

    def kills(self):
        return sum(map(len, self._lost.values()))

    def go(self):
        faults.finish(self._folder / 'undisturbed', **RUN)
        print(f'undisturbed: {STEPS} steps in {time.monotonic() - self._begin:.0f} s', flush=True)
        self._begin = time.monotonic()
        while self.kills() < self._wanted:
            self._run(self._folder / f'run_{self._runs}')
            self._runs += 1
        return self._table()

    def _run(self, workdir):
        """One run from its beginning to its end, through as many lives as it has."""
        damaged, training = 0, faults.Training(workdir, **RUN)
        while self.kills() < self._wanted:
            lost = faults.kill(training, self._rng, self._rng.choice([*SHARES], p=[*SHARES.values()]))
            if lost is None:
                break
            if lost.kind == 'stop' and lost.kept < STEPS:
                assert lost.code == preemption.EXIT_CODE and lost.kept == lost.step, (lost, training.log()[-3000:])
            self._lost[lost.kind].append(lost)
            if self._rng.random() < DAMAGED:
                damaged += damage(workdir, self._rng)
            self._say()
            training = faults.Training(workdir, **RUN)
        assert training.wait() == [0], training.log()[-3000:]
        faults.assert_same_end(workdir, self._folder / 'undisturbed')
        aside = workdir / 'unreadable_checkpoints'
        assert len([*aside.iterdir()] if aside.exists() else []) == damaged
        self._damaged += damaged

    def _say(self):
        done, passed = self.kills(), time.monotonic() - self._begin
        if done % 10 == 0:
            print(f'{done} of {self._wanted} kills, {self._in_saves()} of them in saves; {self._runs} runs ended with '
                  f'the same bits; {60 * done / passed:.1f} kills a minute, ETA '
                  f'{(self._wanted - done) * passed / done / 60:.0f} min', flush=True)

    def _in_saves(self):
        return sum(lost.saving for of_kind in self._lost.values() for lost in of_kind)

    def _table(self):
        rows = [('', 'kills', 'save cut off', 'steps lost: mean', 'max')]
        for kind in (*NAMES, 'all'):
            found = self._lost[kind] if kind in NAMES else [*itertools.chain(*self._lost.values())]
            steps = [max(lost.step - lost.kept, 0) for lost in found] or [0]
            rows.append((NAMES.get(kind, kind), str(len(found)), str(sum(lost.saving for lost in found)),
                         f'{np.mean(steps):.1f}', str(max(steps))))
        lines = ['  '.join(f'{cell:<20}' if column == 0 else f'{cell:>16}' for column, cell in enumerate(row))
                 for row in rows]
        return '\n'.join([*lines, f'{self._damaged} checkpoints were damaged: each was refused and the one before it '
                          f'used; {self._runs} runs of {STEPS} steps, saved at every 5th, ended with the bits of the '
                          f'undisturbed one; {(time.monotonic() - self._begin) / 60:.1f} min'])


def damage(workdir, rng):
    """Flips a bit in any file of the newest checkpoint or cuts it, if all are whole and there is one before it.

    Returns:
      Whether that was done.
    """
    folders = sorted((path for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()),
                     key=lambda path: int(path.name))
    if len(folders) < 2 or not all(map(is_whole, folders)):
        return False
    files = [path for path in folders[-1].rglob('*') if path.is_file() and path.parent != folders[-1]]
    damaging = faults.flip if rng.random() < 0.5 else faults.cut
    damaging(files[rng.integers(len(files))], rng)
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
            print(Soak(folder, options.kills, options.seed).go())
        except AssertionError as error:
            sys.exit(f'error: after a fault the run did not continue as it should: {error}')


if __name__ == '__main__':
    main()
