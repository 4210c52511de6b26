"""Runs the cells of a comparison sequentially. Finished cells are skipped; unfinished cells resume."""

import json
import os
import pathlib
import time
from typing import Any

from absl import logging

from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step
from evit_jax.comparison.cells import Cell, cells_of, config_of, dense_config
from evit_jax.data.sources import Source
from evit_jax.models.config import ViTConfig
from evit_jax.runtime import storage
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import checks, evaluation_config, experiment, loop, results

_DONE = 'done.json'  # file in the folder of a finished cell that holds its result
_RESULT_KEYS = ('top1', 'images', 'macs', 'macs_dense')


def compare(config: Any, out: str | os.PathLike, *, sources: tuple[Source, Source] | None = None,
            model_config: ViTConfig | None = None) -> list[dict[str, Any]]:
    """Runs every unfinished cell, and returns the results of all cells.

    Args:
      config: config of the comparison.
      out: folder of the runs.
      sources: training and test source that replace those in the config.
      model_config: model that replaces the one in the config.

    Returns:
      One row per cell: setting, method, share, seed, top1 (in [0, 1]), images (number evaluated), macs, macs_dense.

    Raises:
      ValueError: the config of a cell is invalid. All configs are checked before the first cell runs.
      Preempted: SIGTERM or SIGINT was received. Finished and unfinished cells are kept.
    """
    out, cells = pathlib.Path(out), cells_of(config)
    objects = {'sources': sources, 'model_config': model_config}
    dense = config.dense or str(out / 'dense')
    if config.dense and newest_step(config.dense) is None:
        raise ValueError(f'config.dense={config.dense} holds no checkpoint: give the workdir of a trained dense model, '
                         "or '' to have one trained")
    for cell in cells:
        check = checks.check if cell.setting == 'untrained' else checks.check_training
        check(workdirs.flat(config_of(config, cell, dense)), model_config)
    if not config.dense and not (out / 'dense' / _DONE).exists():
        logging.info('training the dense model in %s', dense)
        loop.train(dense_config(config), dense, **objects)
        _write_result(out / 'dense', {})
    rows, begin, num_run = [], time.monotonic(), 0
    num_missing = sum(not (out / cell.name / _DONE).exists() for cell in cells)
    for number, cell in enumerate(cells, 1):
        folder = out / cell.name
        if not (folder / _DONE).exists():
            logging.info('%d of %d: %s', number, len(cells), cell)
            _write_result(folder, _run(config_of(config, cell, dense), cell, folder, dense, objects))
            num_run += 1
            minutes = (time.monotonic() - begin) / 60 / num_run * (num_missing - num_run)
            logging.info('%d of %d cells left, about %.0f minutes', num_missing - num_run, num_missing, minutes)
        rows.append(cell._asdict() | json.loads((folder / _DONE).read_text()))
    return rows


def _run(config: Any, cell: Cell, folder: pathlib.Path, dense: str, objects: dict[str, Any]) -> dict[str, Any]:
    """Trains or evaluates one cell, and returns its result."""
    if cell.setting == 'untrained':
        saved = weights.completed(workdirs.trained_config(dense))
        values = evaluation_config.merge(workdirs.flat(config), saved, dense)
        run = experiment.setup(experiment.with_values(config, values), **objects)
        with PreemptionHandler() as preemption:
            state = run.trained_state(dense)
            metrics = results.evaluate_params(run, run.eval_step(), state.params, preemption).metrics
        metrics |= results.costs(run)
    else:
        metrics = loop.train(config, folder, **objects)
    return {name: metrics[name] for name in _RESULT_KEYS}


def _write_result(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(storage.as_path(folder) / _DONE, (json.dumps(result, indent=1) + '\n').encode())
