"""k-NN evaluation by a config: opens the data, applies the plan, and writes a result file."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import newest_step
from evit_jax.checkpoints.model_digest import digest_of_weights
from evit_jax.inference import knn
from evit_jax.inference.model import VisionModel
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime import distributed, machine
from evit_jax.training import checks, evaluation_config, evaluation_files, inputs, model_setup


def config_of(model: VisionModel, given: Mapping[str, Any], *, explicit: Collection[str], from_file: bool,
              plan_file: PlanFile | None = None) -> dict[str, Any]:
    """Returns the flat config of a k-NN evaluation. The number of classes is open: features have none.

    The batch size is `knn.BATCH_SIZE` unless it is given explicitly.

    Args:
      given, explicit, from_file: see `evaluation_config.merge`.
      plan_file: token plan to use instead of the plan in the config.

    Raises:
      ValueError: a value is out of range, an explicit model key differs, or no key names the data.
    """
    path = model.loaded.path
    run = workdirs.saved_config(path) if newest_step(path) is not None else None
    saved = (run or {}) | workdirs.flat(model.loaded.metadata()['config'])
    config = {**given, **evaluation_config.merge(given, saved, path, explicit=explicit, from_file=from_file)}
    if plan_file is not None:
        config |= model_setup.values_of_plan(plan_file, config, explicit, base=model.config)
        if plan_file.weights:
            plan_file.warn_of_other_weights(digest_of_weights(model.params))
    checks.check(config, model.config)
    # The batch size of a recipe is that of a training: a last batch of queries would be mostly padding.
    batch_size = config['batch_size'] if 'batch_size' in explicit else knn.BATCH_SIZE
    return config | {'model.classes': 0, 'batch_size': batch_size}


def evaluate(model: VisionModel, config: Mapping[str, Any], out: str | os.PathLike, *, k: Sequence[int] = knn.K,
             dense_gallery: bool = False) -> dict[str, float]:
    """Classifies the test split by the nearest neighbours in the training split, and writes `knn-PLAN.json`.

    Args:
      model: the weights.
      config: flat config with plan, preprocessing and data, from `config_of`.
      out: a file name that ends in .json, or a folder.
      k: numbers of neighbours.
      dense_gallery: compute the features of the gallery without reductions.

    Returns:
      The result of `knn.knn`, with macs and macs_dense (multiply-accumulates of a query and of the dense model).

    Raises:
      ValueError: there are several processes, the data or `k` do not fit, or `out` cannot be written.
      FloatingPointError: features are not finite.
    """
    if not distributed.is_single_process():
        raise ValueError('a k-NN evaluation runs in one process, on its local devices: start one process')
    evaluation_files.check_out(out)
    model = _with_config(model, config)
    dense = model.with_plan(plan=make_plan(model.plan.patches, model.config.depth, reduce_at=()))
    gallery, queries = inputs.open_sources(config)
    knn.check(gallery, queries, k=k, temperature=knn.TEMPERATURE)
    gallery_model = dense if dense_gallery else model
    logging.info('k-NN: %d images to classify (%s), %d in the gallery (%s)', len(queries), model.plan, len(gallery),
                 gallery_model.plan)
    options = {'batch_size': min(config['batch_size'], max(len(gallery), len(queries))),
               'num_workers': machine.resolve_workers(config['data.workers']), 'max_failed': config['data.max_failed']}
    metrics = knn.accuracies(knn.compute_features(gallery_model, gallery, 'gallery', **options),
                             knn.compute_features(model, queries, 'queries', **options), gallery.num_classes, k=k,
                             temperature=knn.TEMPERATURE) | {'macs': model.macs, 'macs_dense': dense.macs}
    logging.info('k-NN top-1: %s; MACs of a query: %.0f %% of the dense model', ', '.join(
        f'{100 * metrics[f"top1_k{count}"]:.2f} % (k = {count})' for count in k), 100 * model.macs / dense.macs)
    result = {'workdir': model.loaded.path, 'step': model.loaded.step, 'metrics': metrics,
              **evaluation_files.describe(config, model.config, model.plan, queries)}
    result['data'] |= {'classes': gallery.num_classes, 'gallery_split': config['data.train_split'],
                       'gallery_images': len(gallery), 'gallery_plan': evaluation_files.plan_name(gallery_model.plan)}
    result['knn'] = {'k': list(k), 'temperature': knn.TEMPERATURE}
    evaluation_files.files_of(out, model.plan, out, kind='knn').write(result, None)
    return metrics


def _with_config(model, config):
    """Returns the model with the budget, the image size, the preprocessing and the dtype of a config."""
    return VisionModel(model.loaded._replace(
        budget=TokenBudget.of_config(config), image_size=models.image_size_of(config), mean=tuple(config['data.mean']),
        std=tuple(config['data.std']), eval_crop=config['data.eval_crop'] or None,
        interpolation=config['data.interpolation'], dtype=config['model.dtype']))
