"""Runs the cells of a comparison one after the other. What is done is not done again; what was begun goes on."""

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
from evit_jax.runtime import storage
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import checks, evaluation_config, experiment, loop, results

_DONE = 'done.json'


def compare(config: Any, out: str | os.PathLike) -> list[dict[str, Any]]:
    """Has every cell's result, from the folder or by running it.

    Returns:
      A row for each cell: setting, method, share, seed, top1 (of 1), images (it is of), macs, macs_dense.

    Raises:
      ValueError: a cell that cannot be, before the first one experiment.
      Stopped: the process was told to; what is done and what was begun is kept.
    """
    out, cells = pathlib.Path(out), cells_of(config)
    dense = config.dense or str(out / 'dense')
    if config.dense and newest_step(config.dense) is None:
        raise ValueError(f'config.dense={config.dense} holds no checkpoint: give the workdir of a trained dense model, '
                         "or '' to have one trained")
    for cell in cells:
        check = checks.check if cell.setting == 'untrained' else checks.check_training
        check(config_of(config, cell, dense))
    if not config.dense and not (out / 'dense' / _DONE).exists():
        logging.info('first the dense model, in %s', dense)
        loop.train(dense_config(config), dense)
        _note(out / 'dense', {})
    rows, begin, ran = [], time.monotonic(), 0
    missing = sum(not (out / cell.name / _DONE).exists() for cell in cells)
    for number, cell in enumerate(cells, 1):
        folder = out / cell.name
        if not (folder / _DONE).exists():
            logging.info('%d of %d: %s', number, len(cells), cell)
            _note(folder, _run(config_of(config, cell, dense), cell, folder, dense))
            ran += 1
            spent = (time.monotonic() - begin) / 60
            logging.info('%d of %d to go, about %.0f minutes', missing - ran, missing, spent / ran * (missing - ran))
        rows.append(cell._asdict() | json.loads((folder / _DONE).read_text()))
    return rows


def _run(config: Any, cell: Cell, folder: pathlib.Path, dense: str) -> dict[str, Any]:
    """What is found in a cell."""
    if cell.setting == 'untrained':
        trained = weights.completed(workdirs.trained_config(dense))
        run = experiment.setup(evaluation_config.merge(config, trained, dense))
        with PreemptionHandler() as stopping:
            state = run.trained_state(dense)
            found = results.evaluate_params(run, run.eval_step(), state.params, stopping).metrics
        found |= results.costs(run)
    else:
        found = loop.train(config, folder)
    return {name: found[name] for name in ('top1', 'images', 'macs', 'macs_dense')}


def _note(folder, found):
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(storage.as_path(folder) / _DONE, (json.dumps(found, indent=1) + '\n').encode())
