"""The training loop: steps, log lines, checkpoints and evaluations."""

import collections
import os
import time

from absl import logging
from tqdm import tqdm

from evit_jax.checkpoints.best import BestCheckpoint
from evit_jax.checkpoints.manager import CheckpointManager
from evit_jax.checkpoints.state import TrainState
from evit_jax.metrics.step_timer import StepTimer
from evit_jax.metrics.writers import MetricWriter
from evit_jax.runtime import distributed, prefetch
from evit_jax.runtime.preemption import Preempted, PreemptionHandler
from evit_jax.runtime.profiler import StepProfiler, parse_steps
from evit_jax.runtime.programs import Programs
from evit_jax.training import model_setup, results
from evit_jax.training.distillation import Teacher
from evit_jax.training.experiment import Experiment
from evit_jax.training.nonfinite import NonFiniteMonitor

_IN_FLIGHT = 2  # number of steps dispatched before the loss of the oldest is read


class Trainer:
    """Trains a run from a state to the last step."""

    def __init__(self, run: Experiment, teacher: Teacher | None, workdir: str | os.PathLike,
                 checkpoints: CheckpointManager, best: BestCheckpoint, writer: MetricWriter,
                 preemption: PreemptionHandler):
        self._run, self._checkpoints, self._best = run, checkpoints, best
        self._writer, self._preemption = writer, preemption
        self._eval_step = run.eval_step()
        step, self._teacher_params = run.train_step(teacher), (teacher.params,) if teacher else ()
        self._programs = Programs(run.stages, lambda plan: step.lower(
            run.abstract_state(), run.abstract_batch(), plan, *self._teacher_params).compile())
        self._pending: collections.deque = collections.deque()  # (step, stage, metrics) of steps in flight
        self._failures = run.failures(run.train_source)
        self._nonfinite = NonFiniteMonitor(run, checkpoints, workdir)
        self._profiler = StepProfiler(parse_steps(run.config.profile_steps), workdir)
        self._timer = StepTimer(run.total_steps, run.config.batch_size)
        self._last_save = time.monotonic()
        self._eval_every = max(round(run.config.log.eval_epochs * run.steps_per_epoch), 1)  # number of steps

    def train(self, state: TrainState) -> TrainState:
        """Trains from the step of the state to the last step.

        Raises:
          Preempted: SIGTERM or SIGINT was received; the state is saved.
        """
        run, first = self._run, int(state.step)
        batches = run.train_batches(first)
        prefetched = prefetch.DevicePrefetcher(map(self._failures.take, batches), run.mesh)
        bar = tqdm(total=run.total_steps, initial=first, disable=None if distributed.is_process_zero() else True,
                   unit='step', dynamic_ncols=True)
        try:
            self._programs.at(first)
            self._timer.restart(first)
            for step in range(first, run.total_steps):
                self._preemption.check()
                if step and step % self._eval_every == 0:
                    self._evaluate(step, state)
                state = self._step(step, state, prefetched)
                bar.update()
                self._after_step(step + 1, state)
        except Preempted:
            self._save(state)
            self._checkpoints.wait()
            logging.info('saved at step %d; the same command continues from there', int(state.step))
            raise
        finally:
            for resource in (bar, prefetched, batches, self._programs, self._profiler, self._timer):
                resource.close()
        return state

    def _step(self, step, state, batches):
        timer = self._timer
        timer.step(step)
        with timer.phase('compile'):
            stage, program = self._programs.at(step)
        with timer.phase('input'):
            batch = next(batches)
        self._profiler.before(step)
        state, metrics = program(state, batch, *self._teacher_params)
        self._profiler.after(step, metrics)
        self._pending.append((step, stage, metrics))
        with timer.phase('devices'):
            self._read_metrics(_IN_FLIGHT)
        return state

    def _after_step(self, done, state):
        """Checks the input and saves a checkpoint, each if due after `done` steps."""
        last = done == self._run.total_steps
        if last or done % self._run.config.log.every == 0:
            self._failures.check()
        if last or done % self._run.config.checkpoint.every == 0 or self._is_save_due(done):
            with self._timer.phase('save'):
                self._save(state)

    def _is_save_due(self, done):
        """Returns True if `checkpoint.minutes` have passed since the last save, by the clock of process 0.

        The processes communicate about this only at steps with a log line.
        """
        config = self._run.config
        if not config.checkpoint.minutes or done % config.log.every:
            return False
        passed = (time.monotonic() - self._last_save) / 60
        due = distributed.is_process_zero() and passed >= config.checkpoint.minutes
        return distributed.sum_over_processes({'due': due})['due'] > 0

    def _save(self, state):
        self._read_metrics(0)
        self._checkpoints.save(state, self._run.metadata)
        self._last_save = time.monotonic()

    def _evaluate(self, done, state):
        self._read_metrics(0)
        weights = {'top1': state.params} | ({'top1_ema': state.ema} if state.ema is not None else {})
        scores = {name: results.evaluate_params(self._run, self._eval_step, params, self._preemption).metrics['top1']
                  for name, params in weights.items()}
        self._writer.write_scalars(done, {f'eval/{name}': value for name, value in scores.items()})
        logging.info('step %d  %s', done, '  '.join(f'eval/{name} {value:.2%}' for name, value in scores.items()))
        self._best.offer(state, scores, self._run.metadata)
        self._timer.restart(done)

    def _read_metrics(self, in_flight):
        """Reads and logs the metrics of all but the newest `in_flight` steps."""
        while len(self._pending) > in_flight:
            step, stage, metrics = self._pending.popleft()
            metrics = {name: float(value) for name, value in metrics.items()}
            self._nonfinite.check(step, metrics)
            if (step + 1) % self._run.config.log.every == 0:
                self._timer.write(step + 1, self._run.epoch(step + 1), metrics,
                                  model_setup.logged_keep_rate(self._run.flat_config, stage), self._writer)
