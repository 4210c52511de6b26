"""Trains, evaluates and resumes one run."""

import collections
import contextlib
import functools
import io
import os
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from evit_jax import parallel
from evit_jax.pictures.curves import training_curves
from evit_jax.pictures.kept import kept_grid
from evit_jax.tokens.plan import make_plan
from evit_jax.training import run as runs
from evit_jax.training import storage
from evit_jax.training import workdir as workdirs
from evit_jax.training.checkpoints import Checkpoints
from evit_jax.training.claim import claim
from evit_jax.training.evaluation import evaluate
from evit_jax.training.programs import Programs
from evit_jax.training.run import Run
from evit_jax.training.state import TrainState
from evit_jax.training.writers import METRICS_FILE, MetricWriter, create_writer, read_metrics

_IN_FLIGHT = 2  # steps sent to the devices before the oldest one's loss is looked at


def train(config: Any, workdir: str | os.PathLike, *, accept_changes: bool = False) -> dict[str, float]:
    """Trains to the end, from the newest checkpoint if there is one, then evaluates and draws pictures.

    The continued run ends with the bits of an undisturbed one: batches and draws are functions of (seed, step).

    Args:
      accept_changes: go on although the workdir's run has another config.

    Returns:
      The final metrics, as `evaluate_state` gives them.

    Raises:
      ValueError: bad config or workdir, before any long work; unreadable checkpoints.
      FloatingPointError: loss or gradient is not finite; names the step. Checkpoints from before it stay.
    """
    runs.check(config)
    with contextlib.ExitStack() as held:
        def open_workdir():
            runs.check_start(config, workdir)
            held.enter_context(claim(workdir))
            workdirs.open_workdir(workdir, config.to_dict(), accept_changes=accept_changes)

        parallel.first_decides(open_workdir)
        return _train(config, workdir)


def evaluate_workdir(config: Any, workdir: str | os.PathLike) -> dict[str, float]:
    """Evaluates the newest checkpoint under the config's plan, image size and data; the weights are as trained.

    Raises:
      ValueError: no run, no checkpoint, or another model.
    """
    runs.check(config)
    trained = workdirs.trained_config(workdir, config.to_dict())
    config = config.copy_and_resolve_references()
    with config.unlocked():  # what shapes the optimizer's state and the average belongs to the checkpoint
        config.update_from_flattened_dict({key: value for key, value in trained.items()
                                           if key.startswith('optimizer.') or key in ('ema_decay', 'model.classes')})
    run = runs.lay_out(config, trained_size=trained['model.image_size'])
    workdirs.check_classes(workdir, trained, run.test_source.class_names)
    checkpoints = Checkpoints(workdir, keep=trained['checkpoint.keep'])
    try:
        state = checkpoints.restore(run.abstract_state())
        if state is None:
            raise ValueError(f'workdir {workdir} holds no checkpoint: train first, or give the right --workdir')
        return evaluate_state(run, state, None, workdir)
    finally:
        checkpoints.close()


def _train(config, workdir):
    run = runs.lay_out(config)
    if not run.total_steps:
        raise ValueError(f'config.batch_size={config.batch_size} is larger than the data: {len(run.train_source)} '
                         f'examples in {config.epochs} epochs; lower the batch or add epochs')
    parallel.first_decides(lambda: workdirs.record_classes(workdir, run.train_source.class_names))
    checkpoints = Checkpoints(workdir, keep=config.checkpoint.keep)
    state = checkpoints.restore(run.abstract_state())
    if state is None:
        state = run.new_state()
    else:
        logging.info('continuing at step %d of %d', int(state.step), run.total_steps)
    writer = create_writer(workdir if parallel.is_first() else None, config.log.writer,
                           resumed_at=int(state.step))
    writer.write_hparams(workdirs.flat(run.config.to_dict()))
    try:
        if int(state.step) < run.total_steps:
            state = _Loop(run, checkpoints, writer).go(state)
        metrics = evaluate_state(run, state, writer, workdir)
    finally:
        writer.close()
        checkpoints.close()
    return metrics


def evaluate_state(run: Run, state: TrainState, writer: MetricWriter | None, workdir: Any) -> dict[str, float]:
    """Full evaluation: weights and EMA, objects, MACs, and the pictures `kept.png` and `curves.png`.

    Returns:
      Metrics of the weights by name; of the EMA with `_ema` behind.
    """
    step = run.eval_step()
    found = _evaluate(run, step, state.params, sample=run.config.log.pictures)
    metrics = dict(found.metrics)
    if state.ema is not None:
        metrics |= {f'{name}_ema': value for name, value in _evaluate(run, step, state.ema).metrics.items()
                    if name in ('loss', 'top1', 'top5')}
    metrics['macs'] = run.model.shape.macs(run.plan)
    metrics['macs_dense'] = run.model.shape.macs(make_plan(run.patches, run.model.shape.depth, rate=(), reduce_at=()))
    _report(run, int(state.step), metrics)
    if writer is not None:
        writer.write_scalars(int(state.step), {f'eval/{name}': value for name, value in metrics.items()})
        writer.flush()
    if parallel.is_first():
        _draw(run, found.sample, storage.place(workdir))
    return metrics


class _Loop:
    """The training loop's own moving parts."""

    def __init__(self, run: Run, checkpoints: Checkpoints, writer: MetricWriter):
        self._run, self._checkpoints, self._writer = run, checkpoints, writer
        self._eval_step = run.eval_step()
        step = run.train_step()
        self._programs = Programs(run.stages, lambda plan: step.lower(
            run.abstract_state(), self._abstract_batch(), plan).compile())
        self._pending: collections.deque = collections.deque()
        self._failures = runs.failures(run, run.train_source)
        self._meter = _Meter(run)

    def go(self, state: TrainState) -> TrainState:
        """From the state's step to the end."""
        run, first = self._run, int(state.step)
        batches = runs.train_batches(run, first)
        placed = parallel.OnDevices(map(self._failures.take, batches), run.mesh)
        bar = tqdm(total=run.total_steps, initial=first, disable=None if parallel.is_first() else True,
                   unit='step', dynamic_ncols=True)
        try:
            for step in range(first, run.total_steps):
                stage, program = self._programs.at(step)
                with self._meter.waiting():
                    batch = next(placed)
                state, metrics = program(state, batch)
                self._pending.append((step, stage, metrics))
                self._settle(_IN_FLIGHT)
                bar.update()
                self._after(step + 1, state)
        finally:
            bar.close()
            placed.close()
            batches.close()
            self._programs.close()
        return state

    def _after(self, done, state):
        """What is due once `done` steps are made."""
        run = self._run
        last = done == run.total_steps
        every = max(round(run.config.log.eval_epochs * run.steps_per_epoch), 1)
        if last or done % run.config.log.every == 0:
            self._failures.check()
        if last or done % run.config.checkpoint.every == 0:
            self._settle(0)
            self._checkpoints.save(state, run.about)
        if not last and done % every == 0:
            self._settle(0)
            self._evaluate(done, state)
            self._meter.restart(done)

    def _evaluate(self, done, state):
        found = {'': state.params} | ({'_ema': state.ema} if state.ema is not None else {})
        scores = {f'eval/top1{name}': _evaluate(self._run, self._eval_step, params).metrics['top1']
                  for name, params in found.items()}
        self._writer.write_scalars(done, scores)
        logging.info('step %d  %s', done, '  '.join(f'{name} {value:.2%}' for name, value in scores.items()))

    def _settle(self, leave):
        """Looks at the losses of all but the `leave` newest steps."""
        while len(self._pending) > leave:
            step, stage, metrics = self._pending.popleft()
            metrics = {name: float(value) for name, value in metrics.items()}
            if not np.isfinite([metrics['loss'], metrics['grad_norm']]).all():
                self._checkpoints.wait()
                last = self._checkpoints.latest()
                kept = f'the last good checkpoint is that of step {last}' if last else 'there is no checkpoint yet'
                raise FloatingPointError(
                    f'step {step}: loss {metrics["loss"]}, gradient norm {metrics["grad_norm"]} are not finite; '
                    f'{kept}. Lower the learning rate, '
                    'clip the gradient (--config.optimizer.clip_norm=1) or compute in float32')
            if (step + 1) % self._run.config.log.every == 0:
                self._meter.log(step + 1, metrics, runs.keep_rate(self._run, stage), self._writer)

    def _abstract_batch(self):
        config, sharding = self._run.config, parallel.split_batch(self._run.mesh)
        size = config.model.image_size
        shapes = {'image': ((config.batch_size, size, size, 3), np.uint8), 'label': ((config.batch_size,), np.int32)}
        return {name: jax.ShapeDtypeStruct(*of, sharding=sharding) for name, of in shapes.items()}


class _Meter:
    """Rates since the last line."""

    def __init__(self, run: Run):
        self._run, self._begin, self._from, self._waited = run, None, None, 0.0

    def waiting(self):
        return _Stopwatch(self)

    def add(self, seconds):
        self._waited += seconds
        if self._begin is None:
            self._begin = time.perf_counter()

    def restart(self, step):
        self._begin, self._from, self._waited = time.perf_counter(), step, 0.0

    def log(self, step, metrics, rate, writer):
        run, now = self._run, time.perf_counter()
        count = step - self._from if self._from is not None else run.config.log.every
        seconds = max((now - self._begin) / max(count, 1), 1e-9)
        waited = self._waited / max(now - self._begin, 1e-9)
        left = tqdm.format_interval(seconds * (run.total_steps - step))
        logging.info('step %d/%d  epoch %.2f  loss %.4f  lr %.2e  keep %.2f  %.0f images/s  %.0f ms/step  '
                     'input wait %.1f %%  ETA %s', step, run.total_steps, step / run.steps_per_epoch, metrics['loss'],
                     metrics['lr'], rate, run.config.batch_size / seconds, 1e3 * seconds, 100 * waited, left)
        writer.write_scalars(step, {f'train/{name}': value for name, value in metrics.items()} | {
            'train/keep_rate': rate, 'train/images_per_second': run.config.batch_size / seconds,
            'train/step_seconds': seconds, 'train/input_wait': waited})
        self.restart(step)


class _Stopwatch:
    """Adds the time inside to a meter's wait."""

    def __init__(self, meter):
        self._meter = meter

    def __enter__(self):
        self._begin = time.perf_counter()

    def __exit__(self, *error):
        self._meter.add(time.perf_counter() - self._begin)


def _evaluate(run, step, params, sample=0):
    batches, failures = runs.held_out_batches(run), runs.failures(run, run.test_source)
    try:
        found = evaluate(lambda batch: step(params, batch, run.plan), failures.checked(batches),
                         functools.partial(parallel.place_batch, mesh=run.mesh), patches=run.patches, sample=sample)
        return found._replace(metrics=found.metrics | {'left_out': len(run.test_source) - int(found.metrics['images'])})
    finally:
        batches.close()


def _report(run, step, metrics):
    average = f'  EMA top-1 {100 * metrics["top1_ema"]:.2f} %' if 'top1_ema' in metrics else ''
    speed = f'  {metrics["images_per_second"]:.1f} images/s' if 'images_per_second' in metrics else ''
    logging.info('evaluation at step %d: top-1 %.2f %%  top-5 %.2f %%%s%s', step, 100 * metrics['top1'],
                 100 * metrics['top5'], average, speed)
    if metrics['left_out']:
        logging.warning('%d images could not be read and are left out of these figures', metrics['left_out'])
    logging.info('MACs of an image: %.2f M, dense %.2f M (%.0f %%); %s', metrics['macs'] / 1e6,
                 metrics['macs_dense'] / 1e6, 100 * metrics['macs'] / metrics['macs_dense'], run.plan)
    stage = 1
    while f'object_kept_{stage}' in metrics:
        logging.info("stage %d: %.1f %% of the object's patches are still there; random dropping would leave %.1f %%",
                     stage, 100 * metrics[f'object_kept_{stage}'], 100 * metrics[f'random_kept_{stage}'])
        stage += 1


def _draw(run, sample, workdir):
    if sample and sample['kept']:
        size = run.model.shape.patch_size
        page = kept_grid(sample['image'], sample['kept'], size, predictions=sample['prediction'],
                         truths=sample['label'], class_names=run.test_source.class_names)
        _keep_picture(workdir / 'kept.png', lambda file: page.save(file, 'PNG'))
        logging.info('what is kept: %s', workdir / 'kept.png')
    if (metrics := workdir / METRICS_FILE).exists() and (records := read_metrics(metrics)):
        _keep_picture(workdir / 'curves.png', functools.partial(training_curves, records))
        logging.info('curves: %s', workdir / 'curves.png')


def _keep_picture(path, draw):
    png = io.BytesIO()
    draw(png)
    storage.write_whole(path, png.getvalue())
