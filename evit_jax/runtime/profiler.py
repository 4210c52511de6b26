"""A profile of some steps on request, for xprof or TensorBoard."""

import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from absl import logging

from evit_jax.runtime import storage


def parse_steps(asked: str) -> range:
    """'10:20' -> the steps from 10 up to 20; '' -> none.

    Raises:
      ValueError: it is neither.
    """
    if not asked:
        return range(0)
    found = re.fullmatch(r'(\d+):(\d+)', asked)
    if not found or not (steps := range(*map(int, found.groups()))):
        raise ValueError(f'config.profile_steps={asked!r} names no steps: give FIRST:END, as 10:20, or nothing')
    return steps


class StepProfiler:
    """Traces the steps in `workdir/profile`; each process its own."""

    def __init__(self, steps: range, workdir: Any):
        self._steps, self._folder, self._tracing = steps, storage.as_path(workdir) / 'profile', False
        self._written = self._folder  # where JAX, which knows no bucket, writes

    def before(self, step: int) -> None:
        """A step is about to be sent to the devices."""
        if step in self._steps and not self._tracing:
            if storage.is_remote(self._folder):
                self._written = pathlib.Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self._written))
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """A step has been sent; waits for its result if it is the last to trace."""
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what is being traced."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            if self._written != self._folder:
                storage.upload(self._written, self._folder)
                shutil.rmtree(self._written)
            logging.info('profile: %s (look at it with xprof or TensorBoard)', self._folder)
