"""Trains, evaluates and resumes one run."""

import collections
import contextlib
import functools
import os
import time
from collections.abc import Collection
from typing import Any

import jax
from absl import logging
from tqdm import tqdm

from evit_jax.checkpoints import continuation, open_defaults, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.best import BestCheckpoint
from evit_jax.checkpoints.lock import WorkdirLock
from evit_jax.checkpoints.manager import CheckpointManager, newest_step
from evit_jax.checkpoints.state import TrainState
from evit_jax.data import sources
from evit_jax.metrics.step_timer import StepTimer
from evit_jax.metrics.writers import MetricWriter, create_writer
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime import agreement, distributed, prefetch
from evit_jax.runtime.preemption import Preempted, PreemptionHandler
from evit_jax.runtime.profiler import StepProfiler, parse_steps
from evit_jax.runtime.programs import Programs
from evit_jax.training import (
    checks,
    evaluation_config,
    evaluation_files,
    experiment,
    history,
    identity,
    inputs,
    results,
)
from evit_jax.training.distillation import Teacher
from evit_jax.training.experiment import Experiment
from evit_jax.training.nonfinite import NonFinite

_IN_FLIGHT = 2  # steps sent to the devices before the oldest one's loss is looked at


def train(config: Any, workdir: str | os.PathLike, *, accept_changes: bool = False) -> dict[str, float]:
    """Trains to the end, from the newest checkpoint if there is one, then evaluates and draws pictures.

    The continued run ends with the bits of an undisturbed one: batches and draws are functions of (seed, step).

    Args:
      accept_changes: go on although the workdir's run has another config.

    Returns:
      The final metrics, as `results.evaluate_state` gives them.

    Raises:
      ValueError: bad config or workdir, before any long work; unreadable checkpoints.
      OSError: the last checkpoint could not be written.
      FloatingPointError: loss or gradient is not finite; names the step. Checkpoints from before it stay.
      Stopped: SIGTERM or SIGINT came; the state is saved.
    """
    config = agreement.on_every_process(lambda: _to_train(config, workdir))
    identity.check_processes(config, workdir, accept_changes=accept_changes)
    with contextlib.ExitStack() as held:
        def open_workdir():
            checks.check_start(config, workdir)
            held.enter_context(WorkdirLock(workdir))
            continuation.open_workdir(workdir, config.to_dict(), accept_changes=accept_changes)

        distributed.on_process_zero(open_workdir)
        return _train(config, workdir, held, accept_changes)


def evaluate_workdir(config: Any, workdir: str | os.PathLike, *, explicit: Collection[str] | None = None,
                     from_file: bool = True, planned: PlanFile | None = None,
                     out: str | os.PathLike | None = None) -> dict[str, float]:
    """Evaluates the newest checkpoint of a run and writes `evaluate-PLAN.json` and `.png`; the run's files stay.

    Model, preprocessing and image size are those of the run; data and plan are the config's; see `evaluation_config`. A
    run may go on meanwhile.

    Args:
      config: see `evaluation_config.merge`, as for `explicit` and `from_file`.
      planned: plan of a file, in place of the config's.
      out: a file that ends in .json, or a folder, in place of the workdir.

    Raises:
      ValueError: no run, no checkpoint, another model, other classes, or `out` cannot be written.
    """
    def to_evaluate():
        weights.check_is_workdir('--workdir', workdir)
        saved = weights.completed(workdirs.trained_config(workdir))
        merged = evaluation_config.merge(config, saved, os.fspath(workdir), explicit=explicit, from_file=from_file)
        if planned is not None:
            merged = experiment.apply_plan(merged, planned, explicit or ())
        checks.check(merged)
        return saved, merged

    trained, config = agreement.on_every_process(to_evaluate)
    identity.check_processes(config, workdir)
    distributed.on_process_zero(lambda: evaluation_files.check_out(out))
    check = functools.partial(workdirs.check_classes, workdir, trained)
    sources.check_classes(config.data.source, config.data.path, check)
    held_out = inputs.open_test_source(config)
    check(held_out.class_names)
    history.tell_of_other_data(trained, held_out)
    config = evaluation_config.with_batch_for(config, len(held_out), jax.device_count())
    run = experiment.setup(config, trained=trained, sources=(held_out, held_out))
    files = evaluation_files.files_of(workdir, run.plan, out)
    with PreemptionHandler() as stopping:
        return results.evaluate_into(run, run.trained_state(workdir), files, stopping, workdir=workdir)


def _to_train(config, workdir):
    """The checked config of a training, with nothing left to the weights or the machine."""
    checks.check_training(config)
    return open_defaults.resolve_for_training(config, workdir, jax.devices()[0].platform)


def _train(config, workdir, held, accept_changes):
    """In a claimed workdir; what is to be closed in the end is `held`."""
    run = experiment.setup(config)
    teacher = run.read_teacher()
    if not run.total_steps:
        raise ValueError(f'config.batch_size={config.batch_size} is larger than the data: {len(run.train_source)} '
                         f'examples in {config.epochs} epochs; lower the batch or add epochs')
    record = history.of_run(run, teacher)

    def compare_with_workdir():
        workdirs.record_classes(workdir, run.train_source.class_names)
        history.compare(workdir, record, accept_changes=accept_changes)

    distributed.on_process_zero(compare_with_workdir)
    agreement.check_same({'the newest checkpoint in the workdir': newest_step(workdir)},
                         'give all processes one workdir that they share')
    checkpoints = held.enter_context(contextlib.closing(CheckpointManager(workdir, keep=config.checkpoint.keep)))
    state = checkpoints.restore(run.abstract_state())
    if state is None:
        state = run.new_state()
    else:
        run = _moved(run, workdir, int(state.step))
    best = held.enter_context(contextlib.closing(BestCheckpoint(workdir, config.checkpoint.best)))
    writer = held.enter_context(contextlib.closing(create_writer(
        workdir if distributed.is_process_zero() else None, config.log.writer, resumed_at=int(state.step))))
    writer.write_hparams(workdirs.flat(run.config.to_dict()))
    stopping = held.enter_context(PreemptionHandler())
    if int(state.step) < run.total_steps:
        state = _Loop(run, teacher, workdir, checkpoints, best, writer, stopping).go(state)
    metrics = results.evaluate_state(run, state, writer, workdir, stopping)
    best.offer(state, metrics, run.metadata)
    checkpoints.wait()
    return metrics


def _moved(run, workdir, step):
    """The run as it goes on from a checkpoint: at the place in its data where the steps so far have brought it."""
    offset = distributed.on_process_zero(lambda: history.go_on(workdir, run, step))
    run = run.moved(int(distributed.sum_over_processes({'offset': offset or 0})['offset']))  # the others have None
    logging.info('continuing at step %d of %d, epoch %.2f of %d', step, run.total_steps, run.epoch(step),
                 run.config.epochs)
    if step > run.total_steps:
        logging.warning('the run has trained for more than the %d epochs of its config: it is evaluated as it is',
                        run.config.epochs)
    return run


class _Loop:
    """The training loop's own moving parts."""

    def __init__(self, run: Experiment, teacher: Teacher | None, workdir: str | os.PathLike,
                 checkpoints: CheckpointManager, best: BestCheckpoint, writer: MetricWriter,
                 stopping: PreemptionHandler):
        self._run, self._checkpoints, self._best = run, checkpoints, best
        self._writer, self._stopping = writer, stopping
        self._eval_step = run.eval_step()
        step, self._taught_by = run.train_step(teacher), (teacher.params,) if teacher else ()
        self._programs = Programs(run.stages, lambda plan: step.lower(
            run.abstract_state(), run.abstract_batch(), plan, *self._taught_by).compile())
        self._pending: collections.deque = collections.deque()
        self._failures = experiment.failures(run, run.train_source)
        self._nonfinite = NonFinite(run, checkpoints, workdir)
        self._profile = StepProfiler(parse_steps(run.config.profile_steps), workdir)
        self._timer = StepTimer(run.total_steps, run.config.batch_size)
        self._saved = time.monotonic()
        self._every = max(round(run.config.log.eval_epochs * run.steps_per_epoch), 1)  # steps to the next evaluation

    def go(self, state: TrainState) -> TrainState:
        """From the state's step to the end."""
        run, first = self._run, int(state.step)
        batches = experiment.train_batches(run, first)
        placed = prefetch.DevicePrefetcher(map(self._failures.take, batches), run.mesh)
        bar = tqdm(total=run.total_steps, initial=first, disable=None if distributed.is_process_zero() else True,
                   unit='step', dynamic_ncols=True)
        try:
            self._programs.at(first)
            self._timer.restart(first)
            for step in range(first, run.total_steps):
                self._stopping.check()
                if step and step % self._every == 0:
                    self._evaluate(step, state)
                state = self._step(step, state, placed)
                bar.update()
                self._after(step + 1, state)
        except Preempted:
            self._save(state)
            self._checkpoints.wait()
            logging.info('saved at step %d; the same command continues from there', int(state.step))
            raise
        finally:
            for part in (bar, placed, batches, self._programs, self._profile, self._timer):
                part.close()
        return state

    def _step(self, step, state, placed):
        timer = self._timer
        timer.step(step)
        with timer.phase('compile'):
            stage, program = self._programs.at(step)
        with timer.phase('input'):
            batch = next(placed)
        self._profile.before(step)
        state, metrics = program(state, batch, *self._taught_by)
        self._profile.after(step, metrics)
        self._pending.append((step, stage, metrics))
        with timer.phase('devices'):
            self._settle(_IN_FLIGHT)
        return state

    def _after(self, done, state):
        """What is due once `done` steps are made."""
        last = done == self._run.total_steps
        if last or done % self._run.config.log.every == 0:
            self._failures.check()
        if last or done % self._run.config.checkpoint.every == 0 or self._minutes_are_over(done):
            with self._timer.phase('save'):
                self._save(state)

    def _minutes_are_over(self, done):
        """Whether process 0 has not saved for as long as the config allows; asked when all processes are at a line."""
        config = self._run.config
        if not config.checkpoint.minutes or done % config.log.every:
            return False
        passed = (time.monotonic() - self._saved) / 60
        due = distributed.is_process_zero() and passed >= config.checkpoint.minutes
        return distributed.sum_over_processes({'due': due})['due'] > 0

    def _save(self, state):
        self._settle(0)
        self._checkpoints.save(state, self._run.metadata)
        self._saved = time.monotonic()

    def _evaluate(self, done, state):
        self._settle(0)
        found = {'top1': state.params} | ({'top1_ema': state.ema} if state.ema is not None else {})
        scores = {name: results.evaluate_params(self._run, self._eval_step, params, self._stopping).metrics['top1']
                  for name, params in found.items()}
        self._writer.write_scalars(done, {f'eval/{name}': value for name, value in scores.items()})
        logging.info('step %d  %s', done, '  '.join(f'eval/{name} {value:.2%}' for name, value in scores.items()))
        self._best.offer(state, scores, self._run.metadata)
        self._timer.restart(done)

    def _settle(self, leave):
        """Looks at the losses of all but the `leave` newest steps."""
        while len(self._pending) > leave:
            step, stage, metrics = self._pending.popleft()
            metrics = {name: float(value) for name, value in metrics.items()}
            self._nonfinite.look(step, metrics)
            if (step + 1) % self._run.config.log.every == 0:
                self._timer.write(step + 1, self._run.epoch(step + 1), metrics,
                                 experiment.keep_rate(self._run, stage), self._writer)
