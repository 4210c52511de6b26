"""Evaluates a trained state and reports it: metrics, log lines, result files and pictures."""

import functools
import io
import math
import os
from collections.abc import Callable
from typing import Any

from absl import logging

from evit_jax.checkpoints.state import TrainState
from evit_jax.metrics.writers import METRICS_FILE, MetricWriter, read_metrics
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime import distributed, sharding, storage
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training.evaluation import Evaluation, evaluate
from evit_jax.training.evaluation_files import Files, describe
from evit_jax.training.experiment import Experiment
from evit_jax.viz.curves import training_curves
from evit_jax.viz.kept import kept_grid


def evaluate_state(run: Experiment, state: TrainState, writer: MetricWriter | None, workdir: Any,
                   preemption: PreemptionHandler) -> dict[str, float]:
    """Evaluates the weights and their EMA. Writes metrics, `kept.png` and `curves.png` to the workdir of the run.

    Returns:
      The metrics of the weights (see `evaluation.evaluate`), the metrics of the EMA with suffix `_ema`, and `costs`.

    Raises:
      Preempted: SIGTERM or SIGINT was received.
    """
    metrics, sample = _evaluate(run, state, preemption)
    if writer is not None:
        writer.write_scalars(int(state.step), {f'eval/{name}': value for name, value in metrics.items()})
        writer.flush()
    if distributed.is_process_zero():
        _write_pictures(run, sample, storage.as_path(workdir))
    return metrics


def evaluate_into(run: Experiment, state: TrainState, files: Files, preemption: PreemptionHandler, *,
                  workdir: str | os.PathLike) -> dict[str, float]:
    """Evaluates the weights and their EMA, and writes the result to separate files.

    Args:
      workdir: workdir of the weights; it is recorded in the result.

    Returns:
      The metrics; see `evaluate_state`.

    Raises:
      Preempted: SIGTERM or SIGINT was received.
      OSError, ValueError: a required file cannot be written.
    """
    metrics, sample = _evaluate(run, state, preemption)
    if distributed.is_process_zero():
        page = _kept_page(run, sample)
        files.write(_result(run, int(state.step), metrics, workdir), page and _png(page.save, 'PNG'))
    return metrics


def _evaluate(run, state, preemption):
    """Returns the metrics of the weights and the EMA, and sample images for a picture."""
    step = run.eval_step()
    evaluation = evaluate_params(run, step, state.params, preemption, sample=run.config.log.pictures)
    metrics = dict(evaluation.metrics)
    if state.ema is not None:
        ema_metrics = evaluate_params(run, step, state.ema, preemption).metrics
        metrics |= {f'{name}_ema': ema_metrics[name] for name in ('loss', 'top1', 'top5')}
    metrics |= costs(run)
    _log(run, int(state.step), metrics)
    return metrics, evaluation.sample


def _result(run, step, metrics, workdir):
    """Returns the result of an evaluation as JSON types, with model, plan, data and preprocessing."""
    return {
        'workdir': os.fspath(workdir), 'step': step, 'weights': ['params', 'ema'][:1 + ('top1_ema' in metrics)],
        'metrics': metrics | {name: int(metrics[name]) for name in ('images', 'left_out')},
        **describe(run.flat_config, run.model.config, run.plan, run.test_source)}


def evaluate_params(run: Experiment, step: Callable, params: Any, preemption: PreemptionHandler, *,
                    sample: int = 0) -> Evaluation:
    """Evaluates weights on the test split.

    Args:
      step: evaluation step of the run.
      sample: number of images to return for pictures.

    Raises:
      Preempted: SIGTERM or SIGINT was received.
    """
    def checked_step(batch):
        preemption.check()
        return step(params, batch, run.plan)

    batches, failures = run.eval_batches(), run.failures(run.test_source)
    try:
        result = evaluate(checked_step, failures.checked(batches),
                          functools.partial(sharding.shard_batch, mesh=run.mesh), patches=run.patches, sample=sample,
                          classes=run.test_source.num_classes)
        left_out = len(run.test_source) - int(result.metrics['images'])
        return result._replace(metrics=result.metrics | {'left_out': left_out})
    finally:
        batches.close()


def costs(run: Experiment) -> dict[str, int]:
    """Returns the multiply-accumulates (MACs) of one image, under the plan of the run and for the dense model."""
    config = run.model.config
    dense = make_plan(run.patches, config.depth, reduce_at=())
    return {'macs': config.macs(run.plan), 'macs_dense': config.macs(dense)}


def _log(run, step, metrics):
    ema = f'  EMA top-1 {100 * metrics["top1_ema"]:.2f} %' if 'top1_ema' in metrics else ''
    speed = f'  {metrics["images_per_second"]:.1f} images/s' if 'images_per_second' in metrics else ''
    logging.info('evaluation at step %d: top-1 %.2f %%  top-5 %.2f %%%s%s', step, 100 * metrics['top1'],
                 100 * metrics['top5'], ema, speed)
    if not math.isfinite(metrics['loss']):
        logging.warning('the loss is %s: weights or images contain values that are not finite', metrics['loss'])
    if metrics['left_out']:
        logging.warning('%d images could not be read and are left out of these metrics', metrics['left_out'])
    logging.info('MACs of an image: %.2f M, dense %.2f M (%.0f %%); %s', metrics['macs'] / 1e6,
                 metrics['macs_dense'] / 1e6, 100 * metrics['macs'] / metrics['macs_dense'], run.plan)
    line = 'reduction %d keeps %.1f %% of the patches on the object; random dropping would keep %.1f %%'
    if run.plan.reducer.merges:
        line = 'reduction %d leaves %.1f %% of the tokens on the object, and %.1f %% of all tokens'
    number = 1
    while f'object_kept_{number}' in metrics:
        logging.info(line, number, 100 * metrics[f'object_kept_{number}'], 100 * metrics[f'random_kept_{number}'])
        number += 1


def _kept_page(run, sample):
    """Returns a picture of images and their kept patches; None if there are no reductions or no images."""
    if not sample or not sample['kept']:
        return None
    groups = sample['token_of_patch'] if run.plan.reducer.merges else None
    return kept_grid(sample['image'], sample['kept'], run.model.config.patch_size, token_of_patch=groups,
                     predictions=sample['prediction'], truths=sample['label'], class_names=run.test_source.class_names)


def _write_pictures(run, sample, workdir):
    if page := _kept_page(run, sample):
        storage.write_atomic(workdir / 'kept.png', _png(page.save, 'PNG'))
        logging.info('picture of the kept patches: %s', workdir / 'kept.png')
    if (metrics := workdir / METRICS_FILE).exists() and (records := read_metrics(metrics)):
        storage.write_atomic(workdir / 'curves.png', _png(functools.partial(training_curves, records)))
        logging.info('training curves: %s', workdir / 'curves.png')


def _png(draw, *arguments):
    file = io.BytesIO()
    draw(file, *arguments)
    return file.getvalue()
