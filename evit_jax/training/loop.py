"""Trains, resumes and evaluates runs."""

import contextlib
import functools
import os
from collections.abc import Collection
from typing import Any

import jax
from absl import logging
from clu import parameter_overview

from evit_jax.checkpoints import continuation, model_digest, open_defaults, weights
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.best import BestCheckpoint
from evit_jax.checkpoints.lock import WorkdirLock
from evit_jax.checkpoints.manager import CheckpointManager, newest_step
from evit_jax.checkpoints.state import trained_part
from evit_jax.data import sources as data_sources
from evit_jax.data.sources import Source
from evit_jax.metrics.writers import create_writer
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime import agreement, distributed
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import (
    checks,
    evaluation_config,
    evaluation_files,
    experiment,
    history,
    identity,
    initial_model,
    initial_weights,
    inputs,
    limits,
    model_setup,
    results,
)
from evit_jax.training.trainer import Trainer


def train(config: Any, workdir: str | os.PathLike, *, accept_changes: bool = False,
          sources: tuple[Source, Source] | None = None, model_config: ViTConfig | None = None,
          plan_file: PlanFile | None = None, explicit: Collection[str] = ()) -> dict[str, float]:
    """Trains a run to the end, then evaluates it and draws pictures. Resumes from the newest checkpoint, if any.

    A resumed run gives the same bits as an uninterrupted run: batches and random draws are functions of (seed, step).

    Args:
      accept_changes: resume even if the run in the workdir has another config.
      sources: training and test source; default: those in the config.
      model_config: model config to use instead of the named model's. Its values replace those of `config.model`;
        `config.model.classes` must be 0 or equal.
      plan_file: token plan to use instead of the plan in the config.
      explicit: keys given on the command line, which `plan_file` must not contradict.

    Returns:
      The final metrics; see `results.evaluate_state`.

    Raises:
      ValueError: the config or the workdir is invalid (raised before any long work), or checkpoints are unreadable.
      OSError: the last checkpoint could not be written.
      FloatingPointError: the loss or the gradient is not finite. The message gives the step; checkpoints are kept.
      Preempted: SIGTERM or SIGINT was received; the state is saved.
    """
    agreement.on_every_process(lambda: limits.check(workdirs.flat(config)))
    config = experiment.with_values(config, initial_weights.prepare(workdirs.flat(config), workdir))
    config, model_config = agreement.on_every_process(
        lambda: _resolve_and_check(config, workdir, sources, model_config, plan_file, explicit))
    identity.check_processes(workdirs.flat(config), workdir, accept_changes=accept_changes, model=model_config)
    if sources is not None:
        agreement.check_same(identity.of_sources(dict(zip(('train', 'test'), sources))),
                             'give all processes the same data')
    with contextlib.ExitStack() as resources:
        def open_workdir():
            checks.check_start(workdirs.flat(config), workdir, model_config)
            resources.enter_context(WorkdirLock(workdir))
            continuation.open_workdir(workdir, config.to_dict(), accept_changes=accept_changes)

        distributed.on_process_zero(open_workdir)
        run = experiment.setup(config, sources=sources, model_config=model_config)
        return _train(run, workdir, resources, accept_changes)


def evaluate_workdir(config: Any, workdir: str | os.PathLike, *, explicit: Collection[str] | None = None,
                     from_file: bool = True, plan_file: PlanFile | None = None,
                     out: str | os.PathLike | None = None, source: Source | None = None) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run. Writes `evaluate-PLAN.json` and `evaluate-PLAN.png`.

    Model, preprocessing and image size are taken from the run, data and plan from the config. The run may still be
    training; its files are not changed.

    Args:
      config, explicit, from_file: see `evaluation_config.merge`.
      plan_file: token plan to use instead of the plan in the config.
      out: a file name that ends in .json, or a folder; default: the workdir.
      source: test source; default: the one in the config.

    Returns:
      The metrics; see `results.evaluate_state`.

    Raises:
      ValueError: the workdir has no run, no checkpoint, another model or other classes, or `out` cannot be written.
    """
    def merged_config():
        weights.check_is_workdir('--workdir', workdir)
        saved = weights.completed(workdirs.trained_config(workdir))
        model_config = model_configs.saved_in(saved)
        given = workdirs.flat(config)
        values = evaluation_config.merge(given, saved, os.fspath(workdir), explicit=explicit, from_file=from_file)
        values |= _values_of_objects(config, source)
        if plan_file is not None:
            values |= model_setup.values_of_plan(plan_file, given | values, explicit or (), base=model_config)
        merged = experiment.with_values(config, values)
        checks.check(workdirs.flat(merged), model_config)
        if model_config is not None:
            model_configs.check_has_classes(model_config, workdir)
        return saved, merged, model_config

    trained, config, model_config = agreement.on_every_process(merged_config)
    identity.check_processes(workdirs.flat(config), workdir)
    distributed.on_process_zero(lambda: evaluation_files.check_out(out))
    check_classes = functools.partial(workdirs.check_classes, workdir, trained)
    if source is None:
        data_sources.check_classes(config.data.source, config.data.path, check_classes)
        source = inputs.open_test_source(workdirs.flat(config))
    check_classes(source.class_names)
    history.warn_of_other_data(trained, source)
    config = experiment.with_values(config, {'batch_size': evaluation_config.batch_size_for(
        len(source), jax.device_count(), config.batch_size)})
    run = experiment.setup(config, trained=trained, sources=(source, source), model_config=model_config)
    files, state = evaluation_files.files_of(workdir, run.plan, out), run.trained_state(workdir)
    # With several processes, one process may not hold all weights.
    if plan_file is not None and plan_file.weights and distributed.is_single_process():
        plan_file.warn_of_other_weights(model_digest.digest_of_weights(state.params))
    with PreemptionHandler() as preemption:
        return results.evaluate_into(run, state, files, preemption, workdir=workdir)


def _values_of_objects(config, sources, model_config=None):
    """Returns the config values for sources and a model that are passed as objects, by dotted key."""
    values = {} if sources is None else {'data.source': data_sources.OBJECTS, 'data.path': ''}
    return values if model_config is None else values | model_setup.values_of_model(model_config, config.model.name)


def _resolve_and_check(config, workdir, sources, model_config, plan_file, explicit):
    """Checks the config. Returns it with open values resolved from the initial weights and the machine.

    Returns:
      The config, and the model config; None for a named model.
    """
    if model_config is not None and config.model.classes not in (0, model_config.classes):
        raise ValueError(f'config.model.classes={config.model.classes} contradicts the model that is given, which has '
                         f'{model_config.classes} classes: give the number of the model, or 0')
    flat_config = workdirs.flat(config) | workdirs.flat(_values_of_objects(config, sources, model_config))
    values, model_config = initial_model.resolve(flat_config, workdir, model_config)
    flat_config |= workdirs.flat(values)
    if plan_file is not None:
        flat_config |= model_setup.values_of_plan(plan_file, flat_config, explicit, base=model_config)
    checks.check_training(flat_config, model_config)
    flat_config |= open_defaults.resolve_for_training(flat_config, workdir, jax.devices()[0].platform)
    return experiment.with_values(config, flat_config), model_config


def _train(run, workdir, resources, accept_changes):
    """Trains in a locked workdir. Opened objects are added to `resources`, which closes them."""
    config = run.config
    teacher = run.read_teacher()
    if not run.total_steps:
        raise ValueError(f'config.batch_size={config.batch_size} is larger than the data: {len(run.train_source)} '
                         f'examples in {config.epochs} epochs; lower the batch or add epochs')
    record = history.of_run(run, teacher)

    def compare_with_workdir():
        workdirs.record_classes(workdir, run.train_source.class_names)
        workdirs.record_model(workdir, run.model.config)
        history.compare(workdir, record, accept_changes=accept_changes)

    distributed.on_process_zero(compare_with_workdir)
    agreement.check_same({'the newest checkpoint in the workdir': newest_step(workdir)},
                         'give all processes one workdir that they share')
    checkpoints = resources.enter_context(
        contextlib.closing(CheckpointManager(workdir, keep=config.checkpoint.keep)))
    state = checkpoints.restore(run.abstract_state())
    if state is None:
        state = run.new_state()
    else:
        run = _resumed(run, workdir, int(state.step))
    logging.info('parameters:\n%s', parameter_overview.get_parameter_overview(
        run.abstract_state().params, include_stats=False))
    if config.model.freeze:
        logging.info('model.freeze=%s: only these are trained: %s', config.model.freeze, ', '.join(weights.by_name(
            trained_part(run.abstract_state().params, config.model.freeze))))
    best = resources.enter_context(contextlib.closing(BestCheckpoint(workdir, config.checkpoint.best)))
    writer = resources.enter_context(contextlib.closing(create_writer(
        workdir if distributed.is_process_zero() else None, config.log.writer, resumed_at=int(state.step))))
    writer.write_hparams(run.flat_config)
    preemption = resources.enter_context(PreemptionHandler())
    if int(state.step) < run.total_steps:
        state = Trainer(run, teacher, workdir, checkpoints, best, writer, preemption).train(state)
    metrics = results.evaluate_state(run, state, writer, workdir, preemption)
    best.offer(state, metrics, run.metadata)
    checkpoints.wait()
    return metrics


def _resumed(run, workdir, step):
    """Returns the run with the position in the data that it had reached at a checkpoint."""
    offset = distributed.on_process_zero(lambda: history.record_segment(workdir, run, step))
    # `on_process_zero` returns None in the other processes; the sum gives them the offset of process 0.
    run = run.with_offset(int(distributed.sum_over_processes({'offset': offset or 0})['offset']))
    logging.info('continuing at step %d of %d, epoch %.2f of %d', step, run.total_steps, run.epoch(step),
                 run.config.epochs)
    if step > run.total_steps:
        logging.warning('the run has trained for more than the %d epochs of its config: it is only evaluated',
                        run.config.epochs)
    return run
