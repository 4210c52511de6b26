"""k-nearest-neighbour classification of features: measures a model without training a head.

The neighbours of a query are the gallery images of largest cosine similarity. Each neighbour votes for its class with
weight exp(similarity / temperature).

Source: Wu et al., arXiv 1805.01978; DINO, arXiv 2104.14294, which uses k = 10 and 20 and temperature 0.07.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evit_jax.data import pipeline, sources
from evit_jax.data.failures import Failures
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source
from evit_jax.inference.model import VisionModel

K = (1, 10, 20)
TEMPERATURE = 0.07
BATCH_SIZE = 64  # number of images computed at a time
_CELLS = 2**26  # largest number of similarities computed at a time (256 MB)


class Features(NamedTuple):
    """The features of the N readable images of a source."""

    values: np.ndarray  # [N, D] float32, each of length 1
    labels: np.ndarray  # [N] int32
    left_out: int       # number of unreadable images


def knn(model: VisionModel, gallery: Any, queries: Any, *, k: Sequence[int] = K, temperature: float = TEMPERATURE,
        gallery_model: VisionModel | None = None, batch_size: int = BATCH_SIZE) -> dict[str, float]:
    """Evaluates the features of a model under its token plan by k-NN classification.

    Args:
      gallery: labelled images among which the neighbours are searched, in any form that `evit_jax.train` accepts.
      queries: labelled images to classify, of the same classes.
      k: numbers of neighbours; each gives one accuracy.
      temperature: positive; a small one gives the nearest neighbours more weight.
      gallery_model: model that computes the features of the gallery, such as the dense model; default: `model`.
      batch_size: number of images computed at a time.

    Returns:
      A dict with top1_kN in [0, 1] for each number N in `k`, gallery and queries (numbers of images), and left_out
      (number of unreadable images).

    Raises:
      ValueError: the classes of gallery and queries differ, or `k` or `temperature` is out of range.
      FloatingPointError: features are not finite.
    """
    gallery = sources.as_source(gallery)
    queries = sources.as_source(queries, () if isinstance(queries, Source) else gallery.class_names)
    check(gallery, queries, k=k, temperature=temperature)
    batch_size = min(batch_size, max(len(gallery), len(queries)))
    of_gallery = compute_features(gallery_model or model, gallery, 'gallery', batch_size=batch_size)
    of_queries = compute_features(model, queries, 'queries', batch_size=batch_size)
    return accuracies(of_gallery, of_queries, gallery.num_classes, k=k, temperature=temperature)


def check(gallery: Source, queries: Source, *, k: Sequence[int], temperature: float) -> None:
    """Checks the arguments of `knn` before images are read.

    Raises:
      ValueError: the classes of gallery and queries differ, or `k` or `temperature` is out of range.
    """
    if (gallery.num_classes, tuple(gallery.class_names)) != (queries.num_classes, tuple(queries.class_names)):
        raise ValueError(f'the gallery has {gallery.num_classes} classes, the queries have {queries.num_classes}, or '
                         'their names differ: give images of the same classes')
    if not k or min(k) < 1 or max(k) > len(gallery):
        raise ValueError(f'k={tuple(k)} is outside [1, {len(gallery)}], the number of images in the gallery: give '
                         'other numbers of neighbours, or more images')
    if not temperature > 0:
        raise ValueError(f'temperature={temperature} is not positive: 0.07 is usual')


def compute_features(model: VisionModel, source: Source, name: str, *, batch_size: int, num_workers: int = 0,
                     max_failed: float = 1.0) -> Features:
    """Computes the features of all readable images, in the order of the source.

    Args:
      name: name of the images in the log.
      num_workers: number of decoding processes; 0: a thread.
      max_failed: largest fraction of unreadable images.

    Raises:
      ValueError: too many images are unreadable, or all are.
      FloatingPointError: features are not finite.
    """
    batches = pipeline.eval_batches(source, batch_size=batch_size, transform=model.loaded.eval_transform(),
                                    num_workers=num_workers)
    compiled, plan = model.compiled(batch_size), model.plan
    progress = Progress(f'features of the {name}', len(source), 'images')
    values, labels = [], []
    try:
        for batch in Failures(max_failed, len(source)).checked(batches):
            readable = batch['weight'] > 0
            values.append(np.asarray(compiled.run('features', batch['image'], plan))[readable])
            labels.append(batch['label'][readable])
            progress.add(int((batch['index'] >= 0).sum()))
    finally:
        batches.close()
    values, labels = np.concatenate(values), np.concatenate(labels)
    if not len(values):
        raise ValueError(f'none of the {len(source)} images of the {name} can be read')
    if bad := int((~np.isfinite(values).all(axis=1)).sum()):
        raise FloatingPointError(f'the features of {bad} of {len(values)} images are not finite: compute in float32 '
                                 '(--config.model.dtype=float32)')
    length = np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return Features(values / length, labels, len(source) - len(values))


def accuracies(gallery: Features, queries: Features, classes: int, *, k: Sequence[int],
               temperature: float) -> dict[str, float]:
    """Returns the result of `knn` for given features."""
    if max(k) > len(gallery.values):
        raise ValueError(f'k={max(k)}, but only {len(gallery.values)} images of the gallery can be read')
    rows = max(1, _CELLS // len(gallery.values))
    on_device = jnp.asarray(gallery.values), jnp.asarray(gallery.labels)
    predicted = np.concatenate([
        classify(*on_device, queries.values[start:start + rows], k=tuple(k), temperature=temperature, classes=classes)
        for start in range(0, len(queries.values), rows)], axis=1)
    right = (predicted == queries.labels).mean(axis=1)
    return {f'top1_k{count}': float(value) for count, value in zip(k, right, strict=True)} | {
        'gallery': len(gallery.values), 'queries': len(queries.values), 'left_out': gallery.left_out + queries.left_out}


@functools.partial(jax.jit, static_argnames=('k', 'classes'))
def classify(gallery: Array, labels: Array, queries: Array, *, k: tuple[int, ...], temperature: float,
             classes: int) -> Array:
    """Classifies features by their nearest neighbours.

    Args:
      gallery: [N, D], of length 1.
      labels: [N] int32.
      queries: [Q, D], of length 1.
      k: numbers of neighbours.

    Returns:
      The class with the largest vote for each number of neighbours, [len(k), Q] int32.
    """
    similarity = jnp.einsum('qd,nd->qn', queries, gallery, precision='highest')
    nearest, index = jax.lax.top_k(similarity, max(k))
    # Relative to the nearest neighbour: the exponential cannot overflow at a small temperature.
    weight, label = jnp.exp((nearest - nearest[:, :1]) / temperature), labels[index]
    row = jnp.arange(len(queries))[:, None]
    votes = [jnp.zeros((len(queries), classes)).at[row, label[:, :count]].add(weight[:, :count]) for count in k]
    return jnp.stack(votes).argmax(axis=-1).astype(jnp.int32)
