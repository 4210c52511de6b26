"""What a trained state is worth: figures, log lines and pictures."""

import functools
import io
from collections.abc import Callable
from typing import Any

from absl import logging

from evit_jax import parallel
from evit_jax.pictures.curves import training_curves
from evit_jax.pictures.kept import kept_grid
from evit_jax.tokens.plan import make_plan
from evit_jax.training import run as runs
from evit_jax.training import storage
from evit_jax.training.evaluation import Evaluation, evaluate
from evit_jax.training.run import Run
from evit_jax.training.state import TrainState
from evit_jax.training.stopping import Stopping
from evit_jax.training.writers import METRICS_FILE, MetricWriter, read_metrics


def evaluate_state(run: Run, state: TrainState, writer: MetricWriter | None, workdir: Any,
                   stopping: Stopping) -> dict[str, float]:
    """Full evaluation: weights and EMA, objects, MACs, and the pictures `kept.png` and `curves.png`.

    Returns:
      Metrics of the weights by name; of the EMA with `_ema` behind.

    Raises:
      Stopped: the run was told to.
    """
    step = run.eval_step()
    found = evaluate_params(run, step, state.params, stopping, sample=run.config.log.pictures)
    metrics = dict(found.metrics)
    if state.ema is not None:
        average = evaluate_params(run, step, state.ema, stopping).metrics
        metrics |= {f'{name}_ema': average[name] for name in ('loss', 'top1', 'top5')}
    metrics |= costs(run)
    _report(run, int(state.step), metrics)
    if writer is not None:
        writer.write_scalars(int(state.step), {f'eval/{name}': value for name, value in metrics.items()})
        writer.flush()
    if parallel.is_first():
        _draw(run, found.sample, storage.place(workdir))
    return metrics


def evaluate_params(run: Run, step: Callable, params: Any, stopping: Stopping, *, sample: int = 0) -> Evaluation:
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

    batches, failures = runs.held_out_batches(run), runs.failures(run, run.test_source)
    try:
        found = evaluate(outputs_of, failures.checked(batches),
                         functools.partial(parallel.place_batch, mesh=run.mesh), patches=run.patches, sample=sample)
        return found._replace(metrics=found.metrics | {'left_out': len(run.test_source) - int(found.metrics['images'])})
    finally:
        batches.close()


def costs(run: Run) -> dict[str, int]:
    """Multiply-accumulates of an image under the run's plan, and of the dense model."""
    shape = run.model.shape
    return {'macs': shape.macs(run.plan), 'macs_dense': shape.macs(make_plan(run.patches, shape.depth, reduce_at=()))}


def _report(run, step, metrics):
    average = f'  EMA top-1 {100 * metrics["top1_ema"]:.2f} %' if 'top1_ema' in metrics else ''
    speed = f'  {metrics["images_per_second"]:.1f} images/s' if 'images_per_second' in metrics else ''
    logging.info('evaluation at step %d: top-1 %.2f %%  top-5 %.2f %%%s%s', step, 100 * metrics['top1'],
                 100 * metrics['top5'], average, speed)
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


def _draw(run, sample, workdir):
    if sample and sample['kept']:
        size = run.model.shape.patch_size
        page = kept_grid(sample['image'], sample['kept'], size, home=sample.get('home'),
                         predictions=sample['prediction'], truths=sample['label'],
                         class_names=run.test_source.class_names)
        _keep_picture(workdir / 'kept.png', lambda file: page.save(file, 'PNG'))
        logging.info('what is kept: %s', workdir / 'kept.png')
    if (metrics := workdir / METRICS_FILE).exists() and (records := read_metrics(metrics)):
        _keep_picture(workdir / 'curves.png', functools.partial(training_curves, records))
        logging.info('curves: %s', workdir / 'curves.png')


def _keep_picture(path, draw):
    png = io.BytesIO()
    draw(png)
    storage.write_whole(path, png.getvalue())
