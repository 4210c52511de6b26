"""Steps whose loss or gradient is not finite: their examples are named, and the run ends or skips them."""

import json
import math

from absl import logging

from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.data import order
from evit_jax.runtime import distributed, storage
from evit_jax.training.experiment import Experiment

_MOST_IN_A_ROW = 100  # skipped steps, after which nothing can be expected of the rest
_NAMED = 3            # examples in the log; all of them are in the file


class NonFinite:
    """Looks at the metrics of each step, in order.

    Attributes:
      count: steps skipped so far.
    """

    def __init__(self, run: Experiment, checkpoints: CheckpointManager, workdir: str):
        self.count, self._in_a_row = 0, 0
        self._run, self._checkpoints, self._folder = run, checkpoints, storage.as_path(workdir) / 'nonfinite'

    def look(self, step: int, metrics: dict[str, float]) -> None:
        """Of one step.

        Raises:
          FloatingPointError: a loss or gradient that ends the run.
        """
        if math.isfinite(metrics['loss']) and math.isfinite(metrics['grad_norm']):
            self._in_a_row = 0
            return
        said = (f'step {step}: loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]} are not finite'
                + self._examples(step, metrics))
        skips = self._run.config.nonfinite == 'skip'
        if skips and self._in_a_row < _MOST_IN_A_ROW:
            self.count, self._in_a_row = self.count + 1, self._in_a_row + 1
            logging.warning('%s; skipped, %d so far', said, self.count)
            return
        last = self._checkpoints.latest()
        raise FloatingPointError(
            f'{said}; {f"{_MOST_IN_A_ROW} steps before it were skipped; " if skips else ""}'
            f'{f"the last good checkpoint is that of step {last}" if last else "there is no checkpoint yet"}. Lower '
            'the learning rate, clip the gradient (--config.optimizer.clip_norm=1), compute in float32'
            + ('' if skips else ', or pass over such steps (--config.nonfinite=skip)'))

    def _examples(self, step, metrics):
        """Writes down which they are; the words for it."""
        if not distributed.is_process_zero():
            return ''
        config = self._run.config
        ids = order.batch_ids(self._run.train_source, step, batch_size=config.batch_size, seed=config.seed,
                              repeats=config.data.repeats, offset=self._run.offset)
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f'{step}.json'
        said = {name: str(value) for name, value in metrics.items()} | {'examples': ids}
        file.write_text(json.dumps(said, indent=1))
        return f' (its {len(ids)} examples, {", ".join(ids[:_NAMED])} ..., are in {file})'
