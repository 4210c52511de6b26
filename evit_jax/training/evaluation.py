"""Computes accuracy over a data set, and the fraction of object patches that remain after each reduction."""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from clu.metrics import Average

from evit_jax.runtime import distributed, sharding
from evit_jax.training.examples import Examples

OBJECT_COVER = 0.1  # a patch belongs to the object if the mask covers more than this fraction of the patch


class Evaluation(NamedTuple):
    """The result of an evaluation. Fractions are in [0, 1]."""

    metrics: dict[str, float]
    sample: dict[str, Any]  # see `Examples`: image, label, prediction; for each reduction kept [B, K] and
                            # token_of_patch [B, P]


def evaluate(step: Callable[[dict], dict], batches: Iterable[dict], put: Callable[[dict], dict], *, patches: int,
             sample: int = 0, classes: int = 0) -> Evaluation:
    """Evaluates all batches. Each image counts once; padding (weight 0) does not count.

    Each process evaluates its own rows of the batches. Sums are float64; at the end they are added over the processes.

    Args:
      step: batch on the devices -> dict of outputs; see `make_eval_step`.
      put: transfers image and label of a batch to the devices.
      patches: number of patches of an image.
      sample: number of images to return for pictures, spread over the classes.
      classes: number of classes in the data.

    Returns:
      The metrics are images (number of evaluated images), loss, top1, top5 and images_per_second (without the first
      batch, which may compile). If the data has masks, there are two more for each reduction s, counted from 1:
      object_kept_s (fraction of object patches that remain) and random_kept_s (the fraction under random
      dropping). A patch in a merged token counts as 1 / (number of patches in the token). Under merging, object_kept_s
      is thus the number of tokens on the object, divided by its number of patches.

    Raises:
      ValueError: no image could be read.
      FloatingPointError: the outputs for some images are not finite, although the weights are finite.
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
        raise ValueError('none of the images to evaluate on could be read: repair them, or give other data')
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
    on_object = np.zeros((len(weight), patches), bool)  # a batch that is only padding has no masks
    if 'mask' in batch:
        on_object = object_patches(batch['mask'], patches) & (weight > 0)[:, None]
    for number, share in enumerate(map(patch_shares, outputs['kept'], outputs['token_of_patch']), 1):
        totals[f'object_kept_{number}'] = (share * on_object).sum()
        counts[f'object_kept_{number}'] = float(on_object.sum())
        totals[f'random_kept_{number}'] = (share.mean(1) * weight).sum()
    return {name: _average(total, counts.get(name, images)) for name, total in totals.items()}


def _average(total, count):
    # The constructors of clu would round to float32.
    return Average(np.float64(total), np.float64(count))


def _over_processes(averages, timed):
    """Sums the averages and the number of timed images over all processes."""
    sums = {(name, field): float(getattr(value, field)) for name, value in averages.items()
            for field in ('total', 'count')}
    sums = distributed.sum_over_processes(sums | {'timed': timed})
    return {name: _average(sums[name, 'total'], sums[name, 'count']) for name in averages}, sums['timed']


def object_patches(mask: np.ndarray, patches: int) -> np.ndarray:
    """Converts object masks, bool [B, H, W], to patches on the object, bool [B, N] in row-major order."""
    batch, height, width = mask.shape
    side = math.isqrt(height * width // patches)  # side of a patch, in pixels
    cover = mask.reshape(batch, height // side, side, width // side, side).mean(axis=(2, 4))
    return cover.reshape(batch, patches) > OBJECT_COVER


def patch_shares(kept: np.ndarray, token_of_patch: np.ndarray) -> np.ndarray:
    """Computes the share of each patch in its token after a reduction, [B, P]: 1 / (number of patches in the token).

    The share of a patch is 0 if it was dropped or fused.

    Args:
      kept: [B, K] patch ids of the tokens; a fused token has a negative id.
      token_of_patch: [B, P] index of the token that contains each patch; -1: dropped.
    """
    batch, patches = token_of_patch.shape
    bins = np.where(token_of_patch < 0, patches, token_of_patch) + (patches + 1) * np.arange(batch)[:, None]
    size = np.bincount(bins.ravel(), minlength=batch * (patches + 1))
    left = (token_of_patch >= 0) & (np.take_along_axis(kept, np.maximum(token_of_patch, 0), axis=1) >= 0)
    return np.where(left, 1 / size[bins], 0)
