"""Handles steps with a non-finite loss or gradient: logs their examples, then ends the run or skips the step."""

import json
import math

from absl import logging

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.data import order
from evit_jax.runtime import distributed, storage
from evit_jax.training.experiment import Experiment

_MAX_IN_A_ROW = 100  # the run ends after this many consecutive skipped steps
_NUM_LOGGED = 3      # number of examples named in the log; the file names all


class NonFiniteMonitor:
    """Checks the metrics of each step, in order.

    Attributes:
      count: number of skipped steps so far.
    """

    def __init__(self, run: Experiment, checkpoints: CheckpointManager, workdir: str):
        self.count, self._in_a_row = 0, 0
        self._run, self._checkpoints, self._folder = run, checkpoints, storage.as_path(workdir) / 'nonfinite'

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Checks one step.

        Raises:
          FloatingPointError: loss or gradient is not finite, and the run cannot skip the step.
        """
        if math.isfinite(metrics['loss']) and math.isfinite(metrics['grad_norm']):
            self._in_a_row = 0
            return
        message = (f'step {step}: loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]} are not finite'
                   + self._write_examples(step, metrics))
        can_skip = self._run.config.nonfinite == 'skip'
        if can_skip and self._in_a_row < _MAX_IN_A_ROW:
            self.count, self._in_a_row = self.count + 1, self._in_a_row + 1
            logging.warning('%s; skipped, %d so far', message, self.count)
            return
        last = self._checkpoints.latest()
        raise FloatingPointError(
            f'{message}; {f"{_MAX_IN_A_ROW} steps before it were skipped; " if can_skip else ""}'
            f'{f"the last good checkpoint is that of step {last}" if last else "there is no checkpoint yet"}. Lower '
            'the learning rate, clip the gradient (--config.optimizer.clip_norm=1), compute in float32'
            + ('' if can_skip else ', or skip such steps (--config.nonfinite=skip)'))

    def _write_examples(self, step, metrics):
        """Writes the ids of the examples of a step to a file. Returns text for the error message."""
        if not distributed.is_process_zero():
            return ''
        config = self._run.config
        ids = order.batch_ids(self._run.train_source, step, batch_size=config.batch_size, seed=config.seed,
                              repeats=config.data.repeats, offset=self._run.offset)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f'{step}.json'
        content = {name: str(value) for name, value in metrics.items()} | {'examples': ids}
        file.write_text(json.dumps(content, indent=1))
        return f' (its {len(ids)} examples, {", ".join(ids[:_NUM_LOGGED])} ..., are in {file})'
