"""What a trained state is worth: figures, log lines and pictures."""

import functools
import io
import math
import os
from collections.abc import Callable
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints.state import TrainState
from evit_jax.data.sources import split_of
from evit_jax.metrics.writers import METRICS_FILE, MetricWriter, read_metrics
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime import distributed, sharding, storage
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import experiment
from evit_jax.training.evaluation import Evaluation, evaluate
from evit_jax.training.evaluation_files import Files, plan_name
from evit_jax.training.experiment import Experiment
from evit_jax.viz.curves import training_curves
from evit_jax.viz.kept import kept_grid


def evaluate_state(run: Experiment, state: TrainState, writer: MetricWriter | None, workdir: Any,
                   stopping: PreemptionHandler) -> dict[str, float]:
    """Full evaluation: weights and EMA, objects, MACs, and the pictures `kept.png` and `curves.png`.

    Returns:
      Metrics of the weights by name; of the EMA with `_ema` behind.

    Raises:
      Stopped: the run was told to.
    """
    metrics, sample = _evaluated(run, state, stopping)
    if writer is not None:
        writer.write_scalars(int(state.step), {f'eval/{name}': value for name, value in metrics.items()})
        writer.flush()
    if distributed.is_process_zero():
        _draw(run, sample, storage.as_path(workdir))
    return metrics


def evaluate_into(run: Experiment, state: TrainState, files: Files, stopping: PreemptionHandler, *,
                  workdir: str | os.PathLike) -> dict[str, float]:
    """As `evaluate_state`, of a run that is only evaluated: its result goes to files of its own.

    Args:
      workdir: the run whose weights these are; the result names it.

    Raises:
      Stopped: the run was told to.
      OSError, ValueError: files that are required cannot be written.
    """
    metrics, sample = _evaluated(run, state, stopping)
    if distributed.is_process_zero():
        page = _kept_page(run, sample)
        files.write(_result(run, int(state.step), metrics, workdir), page and _png(page.save, 'PNG'))
    return metrics


def _evaluated(run, state, stopping):
    """Metrics of weights and moving average, and images for a picture."""
    step = run.eval_step()
    found = evaluate_params(run, step, state.params, stopping, sample=run.config.log.pictures)
    metrics = dict(found.metrics)
    if state.ema is not None:
        average = evaluate_params(run, step, state.ema, stopping).metrics
        metrics |= {f'{name}_ema': average[name] for name in ('loss', 'top1', 'top5')}
    metrics |= costs(run)
    _report(run, int(state.step), metrics)
    return metrics, found.sample


def _result(run, step, metrics, workdir):
    """The result of an evaluation and its origin, in the types of JSON."""
    config, plan = run.config, run.plan
    return {
        'workdir': os.fspath(workdir), 'step': step, 'weights': ['params', 'ema'][:1 + ('top1_ema' in metrics)],
        'metrics': metrics | {name: int(metrics[name]) for name in ('images', 'left_out')},
        'model': {'name': config.model.name, 'dtype': config.model.dtype} | {
            key: getattr(run.model.config, key) for key in ('classes', 'distilled', *models.UNSHAPED)},
        'plan': {'name': plan_name(plan), 'description': str(plan), 'reducer': plan.reducer.name,
                 'patches': plan.patches, 'reduce_at': list(plan.reductions),
                 'tokens': [plan.keep[block] for block in plan.reductions], 'fused': plan.fused},
        'data': {'source': config.data.source, 'path': config.data.path,
                 'name': config.data.name if config.data.source == 'tfds' else '',
                 'split': split_of(run.test_source, config.data.test_split), 'images': len(run.test_source)},
        'preprocessing': {'image_size': config.model.image_size, 'mean': list(config.data.mean),
                          'std': list(config.data.std), 'eval_crop': config.data.eval_crop}}


def evaluate_params(run: Experiment, step: Callable, params: Any, stopping: PreemptionHandler, *,
                    sample: int = 0) -> Evaluation:
    """Evaluates weights on the test split.

    Args:
      step: the run's evaluation step.
      sample: images kept for pictures.

    Raises:
      Stopped: the run was told to.
    """
    def outputs_of(batch):
        stopping.check()
        return step(params, batch, run.plan)

    batches, failures = experiment.held_out_batches(run), experiment.failures(run, run.test_source)
    try:
        found = evaluate(outputs_of, failures.checked(batches),
                         functools.partial(sharding.shard_batch, mesh=run.mesh), patches=run.patches, sample=sample,
                         classes=run.test_source.num_classes)
        return found._replace(metrics=found.metrics | {'left_out': len(run.test_source) - int(found.metrics['images'])})
    finally:
        batches.close()


def costs(run: Experiment) -> dict[str, int]:
    """Multiply-accumulates of an image under the run's plan, and of the dense model."""
    config = run.model.config
    dense = make_plan(run.patches, config.depth, reduce_at=())
    return {'macs': config.macs(run.plan), 'macs_dense': config.macs(dense)}


def _report(run, step, metrics):
    average = f'  EMA top-1 {100 * metrics["top1_ema"]:.2f} %' if 'top1_ema' in metrics else ''
    speed = f'  {metrics["images_per_second"]:.1f} images/s' if 'images_per_second' in metrics else ''
    logging.info('evaluation at step %d: top-1 %.2f %%  top-5 %.2f %%%s%s', step, 100 * metrics['top1'],
                 100 * metrics['top5'], average, speed)
    if not math.isfinite(metrics['loss']):
        logging.warning('the loss is %s: weights or images hold values that are not finite', metrics['loss'])
    if metrics['left_out']:
        logging.warning('%d images could not be read and are left out of these figures', metrics['left_out'])
    logging.info('MACs of an image: %.2f M, dense %.2f M (%.0f %%); %s', metrics['macs'] / 1e6,
                 metrics['macs_dense'] / 1e6, 100 * metrics['macs'] / metrics['macs_dense'], run.plan)
    merged = 'stage %d: the object has %.1f %% of the tokens it had, the whole image %.1f %%'
    said = merged if run.plan.reducer.merges else (
            "stage %d: %.1f %% of the object's patches are still there; random dropping would leave %.1f %%")
    stage = 1
    while f'object_kept_{stage}' in metrics:
        logging.info(said, stage, 100 * metrics[f'object_kept_{stage}'], 100 * metrics[f'random_kept_{stage}'])
        stage += 1


def _kept_page(run, sample):
    """The picture of images and the patches that are kept; None without reductions, or without images."""
    if not sample or not sample['kept']:
        return None
    groups = sample['token_of_patch'] if run.plan.reducer.merges else None
    return kept_grid(sample['image'], sample['kept'], run.model.config.patch_size, token_of_patch=groups,
                     predictions=sample['prediction'], truths=sample['label'], class_names=run.test_source.class_names)


def _draw(run, sample, workdir):
    if page := _kept_page(run, sample):
        storage.write_atomic(workdir / 'kept.png', _png(page.save, 'PNG'))
        logging.info('what is kept: %s', workdir / 'kept.png')
    if (metrics := workdir / METRICS_FILE).exists() and (records := read_metrics(metrics)):
        storage.write_atomic(workdir / 'curves.png', _png(functools.partial(training_curves, records)))
        logging.info('curves: %s', workdir / 'curves.png')


def _png(draw, *arguments):
    file = io.BytesIO()
    draw(file, *arguments)
    return file.getvalue()
