"""Runs the cells of a comparison sequentially. Finished cells are skipped; unfinished cells resume."""

import hashlib
import json
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from absl import logging

from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.continuation import FREE_IN_TRAINING
from evit_jax.checkpoints.manager import newest_step
from evit_jax.comparison import features, recording, similarity
from evit_jax.comparison.cells import FEATURES, TRAINED, Cell, cells_of, config_of, dense_config
from evit_jax.data import fingerprint
from evit_jax.data.sources import Source
from evit_jax.inference.model import VisionModel
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime import storage
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import (
    checks,
    evaluation_config,
    experiment,
    initial_model,
    initial_weights,
    inputs,
    loop,
    model_setup,
    results,
)

_DONE = 'done.json'  # file in the folder of a finished cell that holds its result
_VERSION = 1  # raise it with every change of the code that changes results of cells
_RESULT_KEYS = ('top1', 'images', 'macs', 'macs_dense')
_DATA_KEYS = ('data.', 'model.classes', 'model.image_size', 'seed')  # keys that a source is opened with


class Comparison(NamedTuple):
    """The inputs of all cells of a comparison.

    Attributes:
      config: config of the comparison.
      out: folder of the runs.
      dense: workdir of the dense model.
      plans: (method, share) -> plan file that replaces the share of the MACs.
      resolved: values of the run that the initial weights determine, by dotted key.
      model_config: model that replaces the one in the config; None: that of the config.
      sources: training and test source that replace those in the config; None: those of the config.
      described: values of the config -> descriptions of the training and the test source; filled by `data`.
    """

    config: Any
    out: pathlib.Path
    dense: str
    plans: Mapping[tuple[str, float], PlanFile]
    resolved: Mapping[str, Any]
    model_config: ViTConfig | None
    sources: tuple[Source, Source] | None
    described: dict[tuple, Sequence[dict[str, Any]]]

    @property
    def objects(self) -> dict[str, Any]:
        """The arguments of `loop.train` and `experiment.setup` that replace values of the config."""
        return {'sources': self.sources, 'model_config': None if self.resolved else self.model_config}

    def flat_config(self, cell: Cell) -> dict[str, Any]:
        """Returns the flat config of a cell, with the values that initial weights and a plan file determine."""
        flat = workdirs.flat(config_of(self.config, cell, self.dense, self.resolved))
        if plan := self.plans.get((cell.method, cell.share)):
            flat |= model_setup.values_of_plan(plan, flat, base=self.model_config)
        return flat

    def data(self, cell: Cell) -> Sequence[dict[str, Any]]:
        """Describes the training and the test source of a cell; see `fingerprint.describe`."""
        flat = self.flat_config(cell)
        key = tuple((name, str(value)) for name, value in flat.items() if name.startswith(_DATA_KEYS))
        if key not in self.described:
            self.described[key] = [fingerprint.describe(source) for source in _sources(self, flat)]
        return self.described[key]

    def digest(self, cell: Cell) -> str:
        """Returns a digest of what decides the result of a cell: config, dense training, plan, data and model."""
        configs = config_of(self.config, cell, self.config.dense), dense_config(self.config)
        settings = [{key: value for key, value in workdirs.flat(each).items() if not key.startswith(FREE_IN_TRAINING)}
                    for each in configs]
        plan = self.plans.get((cell.method, cell.share))
        model_config = self.objects['model_config']
        text = json.dumps([_VERSION, settings, plan and plan.metadata(), self.data(cell),
                           model_config and repr(model_config)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def compare(config: Any, out: str | os.PathLike, *, sources: tuple[Source, Source] | None = None,
            model_config: ViTConfig | None = None,
            plans: Mapping[tuple[str, float], PlanFile] | None = None) -> list[dict[str, Any]]:
    """Runs every unfinished cell, and returns the results of all cells.

    Args:
      config: config of the comparison.
      out: folder of the runs.
      sources: training and test source that replace those in the config.
      model_config: model that replaces the one in the config.
      plans: (method, share) -> plan file that replaces the share of the MACs in these cells.

    Returns:
      One row per cell: setting, method, share, seed, top1 (in [0, 1]), images (number evaluated), macs, macs_dense.

    Raises:
      ValueError: the config of a cell is invalid, or a finished cell had other settings. All cells are checked before
        the first one runs.
      OSError: the data are missing or unreadable.
      Preempted: SIGTERM or SIGINT was received. Finished and unfinished cells are kept.
    """
    out, cells = pathlib.Path(out), cells_of(config)
    if config.dense and newest_step(config.dense) is None:
        raise ValueError(f'config.dense={config.dense} holds no checkpoint: give the workdir of a trained dense model, '
                         "or '' to have one trained")
    if any(cell.setting == 'probe' for cell in cells):
        similarity.check_requirements('config.probe')
    dense = config.dense or str(out / 'dense')
    comparison = Comparison(config, out, dense, plans or {}, *_resolve(config, dense, model_config), sources, {})
    for cell in cells:
        check = checks.check_training if cell.setting in TRAINED else checks.check
        check(comparison.flat_config(cell), comparison.model_config)
    for cell in cells:  # opens the data, which may take a while
        _check_finished(comparison, cell)
    is_needed = not config.dense and any(cell.setting not in ('scratch', *FEATURES) for cell in cells)
    if is_needed and not (out / 'dense' / _DONE).exists():
        logging.info('training the dense model in %s', dense)
        loop.train(dense_config(config), dense, **comparison.objects)
        _write_result(out / 'dense', {})
    return _run_all(comparison, cells)


def _check_finished(comparison, cell):
    """Raises a ValueError if a finished cell had other settings than now."""
    folder = comparison.out / cell.name
    if (folder / _DONE).exists() and json.loads((folder / _DONE).read_text()).get('digest') != comparison.digest(cell):
        raise ValueError(f'{folder} holds the result of other settings (config, plan, data, model or program version): '
                         'give another --out, or remove the folder')


def _resolve(config, dense, model_config):
    """Returns the open values of the run, by dotted key, and its model config; {} if the config leaves none open."""
    flat = workdirs.flat(dense_config(config))
    if model_config is not None or flat['model.name'] != model_setup.INIT_FROM:
        return {}, model_config
    if newest_step(dense) is None:
        flat |= initial_weights.prepare(flat, dense)
    return initial_model.resolve(flat, dense)


def _run_all(comparison, cells):
    rows, begin, num_run = [], time.monotonic(), 0
    num_missing = sum(not (comparison.out / cell.name / _DONE).exists() for cell in cells)
    for number, cell in enumerate(cells, 1):
        folder = comparison.out / cell.name
        if not (folder / _DONE).exists():
            logging.info('%d of %d: %s', number, len(cells), cell)
            begin_cell = time.monotonic()
            result = _run(comparison, cell, folder)
            _write_result(folder, result | {'seconds': round(time.monotonic() - begin_cell, 1),
                                            'digest': comparison.digest(cell)})
            jax.clear_caches()  # cells share no program, and the programs of a ViT-S take 200 MB
            num_run += 1
            minutes = (time.monotonic() - begin) / 60 / num_run * (num_missing - num_run)
            logging.info('%d of %d cells left, about %.0f minutes', num_missing - num_run, num_missing, minutes)
        rows.append(cell._asdict() | json.loads((folder / _DONE).read_text()))
    return rows


def _run(comparison, cell, folder):
    """Trains or evaluates one cell, records its tokens, and returns its result."""
    flat = comparison.flat_config(cell)
    if cell.setting in TRAINED:
        plan = comparison.plans.get((cell.method, cell.share))
        metrics = loop.train(config_of(comparison.config, cell, comparison.dense), folder, plan_file=plan,
                             **comparison.objects)
        model = VisionModel(open_model(folder))
    elif cell.setting in FEATURES:
        model = _model(comparison, flat, _initial_weights(comparison))
        cache = comparison.out / 'features' / comparison.digest(cell)  # k-NN and probe share the features
        metrics = features.classify(cell.setting, model, _sources(comparison, flat), flat, cache)
    else:
        metrics, model = _evaluate(comparison, flat), _model(comparison, flat, comparison.dense)
    count = comparison.config.get('record', 0)
    if count and cell.setting != 'probe':  # the tokens of a probe are those of k-NN
        recording.record(model, _sources(comparison, flat)[1], count, folder)
    return {name: metrics[name] for name in _RESULT_KEYS}


def _evaluate(comparison, flat):
    """Returns the metrics of the dense model under the plan of a flat config."""
    saved = weights.completed(workdirs.trained_config(comparison.dense))
    flat |= evaluation_config.merge(flat, saved, comparison.dense, explicit=() if comparison.resolved else None)
    config = experiment.with_values(comparison.config.run, flat)
    run = experiment.setup(config, sources=comparison.sources,
                           model_config=model_configs.saved_in(saved) or comparison.model_config)
    with PreemptionHandler() as preemption:
        state = run.trained_state(comparison.dense)
        metrics = results.evaluate_params(run, run.eval_step(), state.params, preemption).metrics
    return metrics | results.costs(run)


def _model(comparison, flat, path):
    return VisionModel(features.with_config(open_model(path), flat))


def _initial_weights(comparison):
    """Returns the path of the weights whose features are classified: the initial ones, or the dense model."""
    return comparison.config.run.init_from or comparison.dense


def _sources(comparison, flat):
    return comparison.sources or inputs.open_sources(flat)


def _write_result(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_atomic(storage.as_path(folder) / _DONE, (json.dumps(result, indent=1) + '\n').encode())
