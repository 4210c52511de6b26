"""Computes accuracy over a data set, and the fraction of the object's patches that remain after each reduction."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from clu.metrics import Average

from evit_jax.runtime import distributed, sharding
from evit_jax.training.examples import Examples

OBJECT_COVER = 0.1  # a patch belongs to the object if the mask covers more than this fraction of it


class Evaluation(NamedTuple):
    """The result of an evaluation. Fractions are in [0, 1]."""

    metrics: dict[str, float]
    sample: dict[str, Any]  # see `Examples`: image, label, prediction; kept: per reduction [B, K];
                            # token_of_patch: per reduction [B, P]


def evaluate(step: Callable[[dict], dict], batches: Iterable[dict], put: Callable[[dict], dict], *, patches: int,
             sample: int = 0, classes: int = 0) -> Evaluation:
    """Evaluates all batches. Each image counts once; padding (weight 0) does not count.

    Each process evaluates its own rows of the batches. Sums are float64 and added over the processes at the end.

    Args:
      step: maps a batch on the devices to the dict that the step of `make_eval_step` returns.
      put: puts image and label of a batch on the devices.
      patches: number of patches of an image.
      sample: number of images to keep for pictures, spread over the classes.
      classes: number of classes in the data.

    Returns:
      The metrics are images (the number that counted), loss, top1, top5 and images_per_second (without the first
      batch, which may compile). If the data has masks, there are also, for each reduction s from 1: object_kept_s
      (fraction of the object's patches that remain) and random_kept_s (fraction that random dropping would leave). A
      merged patch counts 1 / (patches of its token), so with merging object_kept_s is the number of tokens that the
      object has left, divided by the number it started with.

    Raises:
      ValueError: no image could be read.
      FloatingPointError: the outputs for some images are not finite, although the weights are.
    """
    averages: dict[str, Average] = {}
    examples = Examples(sample, classes)
    begin, timed = time.perf_counter(), 0
    for number, batch in enumerate(batches):
        outputs = sharding.local_rows(step(put({'image': batch['image'], 'label': batch['label']})))
        if number == 0:
            begin = time.perf_counter()
        else:
            timed += len(batch['weight'])
        update = _batch_averages(outputs, batch, patches)
        averages = {name: averages[name].merge(value) for name, value in update.items()} if averages else update
        examples.add({'image': batch['image'], 'label': batch['label']} | {
            name: outputs[name] for name in ('prediction', 'kept', 'token_of_patch')}, batch)
    seconds = time.perf_counter() - begin
    averages, timed = _over_processes(averages, timed)
    nonfinite = averages.pop('nonfinite', Average(0.0, 0.0))
    if not nonfinite.count:
        raise ValueError('none of the images to evaluate on could be read: mend them, or name others in data.path')
    if nonfinite.total:
        raise FloatingPointError(f'the logits of {nonfinite.total:.0f} of {nonfinite.count:.0f} images are not finite, '
                                 'so the accuracy is undefined. Compute in float32 (--config.model.dtype=float32), or '
                                 'use an earlier checkpoint')
    if not any(value.count for name, value in averages.items() if name.startswith('object_kept_')):
        averages = {name: value for name, value in averages.items() if '_kept_' not in name}
    metrics = {'images': nonfinite.count} | {name: value.compute() for name, value in averages.items()}
    if timed:
        metrics['images_per_second'] = timed / seconds
    return Evaluation(metrics, examples.collect())


def _batch_averages(outputs, batch, patches):
    """Returns the average of each metric over the images of a batch, as float64 sums and counts."""
    weight = batch['weight']
    images = float(weight.sum())
    finite = np.isfinite(outputs['loss'])  # the loss is not finite if a logit is NaN or infinite
    totals = {'loss': (np.where(finite, outputs['loss'], 0) * weight).sum(),
              'top1': (outputs['right'] * weight).sum(), 'top5': (outputs['right5'] * weight).sum(),
              'nonfinite': (~finite & (weight > 0)).sum()}
    counts = {}
    on_object = np.zeros((len(weight), patches), bool)  # a batch of padding alone has no masks
    if 'mask' in batch:
        on_object = object_patches(batch['mask'], patches) & (weight > 0)[:, None]
    for number, share in enumerate(map(patch_shares, outputs['kept'], outputs['token_of_patch']), 1):
        totals[f'object_kept_{number}'] = (share * on_object).sum()
        counts[f'object_kept_{number}'] = float(on_object.sum())
        totals[f'random_kept_{number}'] = (share.mean(1) * weight).sum()
    return {name: _average(total, counts.get(name, images)) for name, total in totals.items()}


def _average(total, count):
    # clu's own constructors round to float32.
    return Average(np.float64(total), np.float64(count))


def _over_processes(averages, timed):
    """Adds the averages, and the number of timed images, over all processes."""
    sums = {(name, field): float(getattr(value, field)) for name, value in averages.items()
            for field in ('total', 'count')}
    sums = distributed.sum_over_processes(sums | {'timed': timed})
    return {name: _average(sums[name, 'total'], sums[name, 'count']) for name in averages}, sums['timed']


def object_patches(mask: np.ndarray, patches: int) -> np.ndarray:
    """Returns the patches on the object: bool [B, S, S] to bool [B, N], row-major."""
    batch, size = mask.shape[:2]
    side = round(patches**0.5)
    cover = mask.reshape(batch, side, size // side, side, size // side).mean(axis=(2, 4))
    return cover.reshape(batch, patches) > OBJECT_COVER


def patch_shares(kept: np.ndarray, token_of_patch: np.ndarray) -> np.ndarray:
    """Computes how much of each patch is left after a reduction, [B, P]: 1 / (number of patches in its token).

    A patch that is dropped, or whose token is a fused one, has 0.

    Args:
      kept: [B, K] patch ids of the tokens; a fused token has a negative id.
      token_of_patch: [B, P] index of the token that holds each patch; -1: dropped.
    """
    batch, patches = token_of_patch.shape
    bins = np.where(token_of_patch < 0, patches, token_of_patch) + (patches + 1) * np.arange(batch)[:, None]
    size = np.bincount(bins.ravel(), minlength=batch * (patches + 1))
    left = (token_of_patch >= 0) & (np.take_along_axis(kept, np.maximum(token_of_patch, 0), axis=1) >= 0)
    return np.where(left, 1 / size[bins], 0)
