"""A short training that launch/slurm.sh submits to a Slurm of the tests."""

import os
import sys

from tests.helpers import layouts
from tests.helpers.stand_ins import LAUNCH

SETTINGS = layouts.SETTINGS | {'batch_size': 16, 'log.eval_epochs': 2.5, 'log.pictures': 0, 'checkpoint.every': 4}
TWO_NODES = ('--nodes=2', '--gpus-per-node=1', '--cpus-per-process=1')


class Job:
    """A training that is slow until `hurry`.

    Args:
      options: options of `slurm.sh submit`.
      overrides: changes of SETTINGS.
      program: text of a script that runs in place of Python.
    """

    def __init__(self, slurm, folder, *options, overrides=(), program=None):
        self._slurm, self._slow, self.workdir, self.logs = slurm, folder / 'slow', folder / 'run', folder / 'logs'
        self._slow.touch()
        python = folder / 'python'
        # slurm.sh runs PYTHON -m evit_jax.main FLAGS.
        python.write_text(program or f'#!/bin/sh\nshift 2\nexec {sys.executable} -m tests.helpers.slow_main "$@"\n')
        python.chmod(0o755)
        settings = [f'--config.{key}={value}' for key, value in (SETTINGS | dict(overrides)).items()]
        output = slurm.run(
            LAUNCH / 'slurm.sh', 'submit', *options, f'--logs={self.logs}', f'--python={python}',
            '--config=configs/base.py', f'--workdir={self.workdir}', '--', *settings, JAX_PLATFORMS='cpu',
            SLOW_MAIN=str(self._slow),
            XLA_FLAGS=f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=1')
        self.number = output.split()[-1]

    def cancel(self):
        self._slurm.run(LAUNCH / 'slurm.sh', 'cancel', '--yes')

    def hurry(self):
        self._slow.unlink()

    def log(self):
        path = self.logs / 'evit.log'
        return path.read_text() if path.exists() else ''

    def wait_for_steps(self):
        """Waits until a step is in the log."""
        self._slurm.wait(self.number, lambda _: ' step 1/' in self.log(), 'step')

    def wait_for_restart(self):
        return self._slurm.wait(self.number, lambda job: job['Restarts'] != '0', 'restart')

    def wait_for_end(self):
        """Waits for the final state. Returns it, the exit code and the number of restarts."""
        job = self._slurm.wait_for_end(self.number)
        return job['JobState'], job['ExitCode'], int(job['Restarts'])
