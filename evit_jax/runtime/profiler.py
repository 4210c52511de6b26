"""Profiles selected steps of a run, for xprof or TensorBoard."""

import pathlib
import re
import shutil
import tempfile
from typing import Any

import jax
from absl import logging

from evit_jax.runtime import storage


def parse_steps(text: str) -> range:
    """Parses 'FIRST:END': '10:20' selects steps 10 to 19, '' selects none.

    Raises:
      ValueError: the text has another form, or the range is empty.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r'(\d+):(\d+)', text)
    if not match or not (steps := range(*map(int, match.groups()))):
        raise ValueError(f'config.profile_steps={text!r} names no steps: give FIRST:END, as 10:20, or nothing')
    return steps


class StepProfiler:
    """Traces steps to `workdir/profile`; each process writes its own trace."""

    def __init__(self, steps: range, workdir: Any):
        self._steps, self._folder, self._tracing = steps, storage.as_path(workdir) / 'profile', False
        self._trace_folder = self._folder  # a local folder, because JAX cannot write to a bucket

    def before(self, step: int) -> None:
        """Starts the trace if this is the first step to trace. Call it before the step is dispatched."""
        if step in self._steps and not self._tracing:
            if storage.is_remote(self._folder):
                self._trace_folder = pathlib.Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self._trace_folder))
            self._tracing = True

    def after(self, step: int, result: Any) -> None:
        """Waits for the result and ends the trace, if this was the last step to trace."""
        if self._tracing and step + 1 not in self._steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Ends and writes an active trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            if self._trace_folder != self._folder:
                storage.upload(self._trace_folder, self._folder)
                shutil.rmtree(self._trace_folder)
            logging.info('profile: %s (open it with xprof or TensorBoard)', self._folder)
