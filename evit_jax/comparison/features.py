"""Classifies the features of a model under a token plan, without training the model: k-NN or a linear probe."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data.sources import Source
from evit_jax.inference import knn
from evit_jax.inference.model import VisionModel
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import make_plan
from evit_jax.runtime import machine

_NEIGHBOURS = 10
_REGULARISATION = 0.1  # argument C of scikit-learn's LogisticRegression, for features with variance 1


def with_config(model: LoadedModel, config: Mapping[str, Any]) -> LoadedModel:
    """Returns the model with the token budget, the image size and the preprocessing of a flat config."""
    size = models.image_size_of(config) or model.image_size
    dtype = machine.resolve_dtype(config['model.dtype'], jax.default_backend())
    return model._replace(budget=TokenBudget.of_config(config), image_size=size, dtype=dtype)


def classify(setting: str, model: VisionModel, sources: tuple[Source, Source], config: Mapping[str, Any],
             cache: pathlib.Path) -> dict[str, float]:
    """Classifies the test images by features under the plan of the model; the training images get the same plan.

    Args:
      setting: 'knn', 10 nearest neighbours, or 'probe', logistic regression on standardised features.
      sources: training and test images.
      config: flat config with the number of workers and the limit of unreadable images.
      cache: path without suffix of the file that holds the features; both settings use one file.

    Returns:
      top1 in [0, 1], images, macs and macs_dense.
    """
    gallery, queries = _cached(model, sources, config, cache.with_name(f'{cache.name}.npz'))
    if setting == 'knn':
        k = min(_NEIGHBOURS, len(gallery.values))
        top1 = knn.accuracies(gallery, queries, sources[0].num_classes, k=(k,),
                              temperature=knn.TEMPERATURE)[f'top1_k{k}']
    else:
        top1 = _probe(gallery, queries)
    dense = make_plan(model.plan.patches, model.config.depth, reduce_at=())
    return {'top1': top1, 'images': len(queries.values), 'macs': model.macs, 'macs_dense': model.config.macs(dense)}


def _probe(gallery, queries):
    from sklearn.linear_model import LogisticRegression  # imported late: an optional dependency
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_REGULARISATION, max_iter=1000))
    return float(probe.fit(gallery.values, gallery.labels).score(queries.values, queries.labels))


def _cached(model, sources, config, file):
    """Returns the features of training and test images, from the file if it exists."""
    if file.exists():
        with np.load(file) as arrays:
            return tuple(knn.Features(*(arrays[f'{name}_{field}'] for field in knn.Features._fields))
                         for name in ('gallery', 'queries'))
    options = {'batch_size': knn.BATCH_SIZE, 'num_workers': machine.resolve_workers(config['data.workers']),
               'max_failed': config['data.max_failed']}
    found = {name: knn.compute_features(model, source, name, **options)
             for name, source in zip(('gallery', 'queries'), sources)}
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix('.tmp.npz')
    np.savez(unfinished, **{f'{name}_{field}': value for name, features in found.items()
                            for field, value in features._asdict().items()})
    unfinished.rename(file)
    return found['gallery'], found['queries']
