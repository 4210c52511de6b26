"""Keeps the best state of a run, separately from the newest checkpoints."""

import os
from typing import Any

from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import CheckpointManager, read_metadata
from evit_jax.checkpoints.state import TrainState
from evit_jax.runtime import distributed, storage

METRICS = ('top1', 'top1_ema')
BEST_FOLDER = 'best'


class BestCheckpoint:
    """Keeps the state with the highest value of a metric in `workdir/best`.

    The folder `best` is itself a workdir: it can be evaluated, and a run can start from its weights.

    Args:
      workdir: folder of the run.
      metric: one of `METRICS`; '': keep no state.
    """

    def __init__(self, workdir: str | os.PathLike, metric: str):
        self._metric, self._checkpoints = metric, None
        self._value_of_step: dict[int | None, float] = {None: float('-inf')}
        if metric:
            folder = storage.as_path(workdir) / BEST_FOLDER
            distributed.on_process_zero(lambda: workdirs.copy_config(workdir, folder))
            self._checkpoints = CheckpointManager(folder, keep=1)
            saved = read_metadata(folder).get('best', {}).get(metric, float('-inf'))
            # All processes use the value that process 0 read, so that they make the same decisions.
            shared = distributed.sum_over_processes({metric: saved if distributed.is_process_zero() else 0.0})
            self._value_of_step[self._checkpoints.latest()] = shared[metric]

    def offer(self, state: TrainState, metrics: dict[str, float], metadata: dict[str, Any]) -> None:
        """Starts saving the state if its metric is higher than the metric of the state on disk."""
        if self._metric and (value := metrics[self._metric]) > self._value_of_step[self._checkpoints.latest()]:
            self._value_of_step[int(state.step)] = value
            self._checkpoints.save(state, metadata | {'best': {self._metric: value}})
            logging.info('the best %s so far, %.4f, is that of step %d', self._metric, value, int(state.step))

    def close(self) -> None:
        """Waits until the current save has ended."""
        if self._checkpoints:
            self._checkpoints.close()
