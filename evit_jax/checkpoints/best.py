"""The best state of a run, kept apart from its newest ones."""

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
    """Keeps the state with the highest value of a metric in `workdir/best`, a workdir to evaluate or to begin from.

    Args:
      metric: one of `METRICS`; '' keeps nothing.
    """

    def __init__(self, workdir: str | os.PathLike, metric: str):
        self._metric, self._checkpoints = metric, None
        self._values: dict[int | None, float] = {None: float('-inf')}  # by step
        if metric:
            folder = storage.as_path(workdir) / BEST_FOLDER
            distributed.on_process_zero(lambda: workdirs.copy_config(workdir, folder))
            self._checkpoints = CheckpointManager(folder, keep=1)
            known = read_metadata(folder).get('best', {}).get(metric, float('-inf'))
            agreed = distributed.sum_over_processes({metric: known if distributed.is_process_zero() else 0.0})
            self._values[self._checkpoints.latest()] = agreed[metric]

    def offer(self, state: TrainState, metrics: dict[str, float], metadata: dict[str, Any]) -> None:
        """Starts saving the state if it is better than the one on disk."""
        if self._metric and (value := metrics[self._metric]) > self._values[self._checkpoints.latest()]:
            self._values[int(state.step)] = value
            self._checkpoints.save(state, metadata | {'best': {self._metric: value}})
            logging.info('the best %s so far, %.4f, is that of step %d', self._metric, value, int(state.step))

    def close(self) -> None:
        """Waits until it is on disk, or could not be written."""
        if self._checkpoints:
            self._checkpoints.close()
