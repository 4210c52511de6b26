"""Accuracy over a data set, and how much of the object is still there after each reduction."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from evit_jax.runtime import distributed, sharding
from evit_jax.training.examples import Examples

OBJECT_COVER = 0.1  # a patch belongs to the object when its mask covers more than this share of it


class Evaluation(NamedTuple):
    """What an evaluation found; shares are fractions of 1."""

    metrics: dict[str, float]
    sample: dict[str, Any]  # see `Examples`: image, label, prediction, kept: per reduction [B, K],
                            # token_of_patch: per reduction [B, P]


def evaluate(step: Callable[[dict], dict], batches: Iterable[dict], place: Callable[[dict], dict], *, patches: int,
             sample: int = 0, classes: int = 0) -> Evaluation:
    """Runs over the batches; each image counts once, padding (weight 0) does not.

    Each process goes through its own rows of the batches; their sums are added up at the end.

    Args:
      step: placed batch -> what `make_eval_step`'s step returns.
      place: puts image and label of a batch on the devices.
      patches: of an image.
      sample: images for pictures, spread over the classes.
      classes: number of them in the data.

    Returns:
      images (that counted), loss, top1, top5, images_per_second (the first batch, which may compile, left out), and
      where the data has masks, per reduction s from 1: object_kept_s (share of the object's patches still there) and
      random_kept_s (what random dropping would leave). Merged patches are there in parts, each by its share of the
      token: object_kept_s is then the tokens that the object has, of those that it had.

    Raises:
      ValueError: no image could be read.
      FloatingPointError: the outputs for some images are not finite, although the weights are.
    """
    sums: dict[str, float] = {}
    examples = Examples(sample, classes)
    begin, timed = time.perf_counter(), 0
    for number, batch in enumerate(batches):
        out = sharding.local_rows(step(place({'image': batch['image'], 'label': batch['label']})))
        if number == 0:
            begin = time.perf_counter()
        else:
            timed += len(batch['weight'])
        for name, value in _sums(out, batch, patches).items():
            sums[name] = sums.get(name, 0.0) + value
        examples.add({'image': batch['image'], 'label': batch['label']} | {
            name: out[name] for name in ('prediction', 'kept', 'token_of_patch')}, batch)
    seconds = time.perf_counter() - begin
    sums = distributed.sum_over_processes(sums | {'timed': timed})
    images, objects, timed, bad = (sums.pop(name) for name in ('images', 'object', 'timed', 'nonfinite'))
    if not images:
        raise ValueError('none of the images to evaluate on could be read: mend them, or name others in data.path')
    if bad:
        raise FloatingPointError(f'the logits of {bad:.0f} of {images:.0f} images are not finite: the accuracy would '
                                 'mean nothing. Compute in float32 (--config.model.dtype=float32), or take an earlier '
                                 'checkpoint')
    metrics = {'images': images} | {name: value / images for name, value in sums.items() if '_kept_' not in name}
    if objects:
        metrics |= {name: value / (objects if name.startswith('object') else images)
                    for name, value in sums.items() if '_kept_' in name}
    if timed:
        metrics['images_per_second'] = timed / seconds
    return Evaluation(metrics, examples.collect())


def _sums(out, batch, patches):
    weight = batch['weight']
    finite = np.isfinite(out['loss'])  # it is not where a logit is NaN or infinity
    sums = {'images': weight.sum(), 'loss': (np.where(finite, out['loss'], 0) * weight).sum(),
            'top1': (out['right'] * weight).sum(), 'top5': (out['right5'] * weight).sum(), 'object': 0,
            'nonfinite': (~finite & (weight > 0)).sum()}
    on_object = np.zeros((len(weight), patches), bool)  # no masks where a share of the data is but padding
    if 'mask' in batch:
        on_object = object_patches(batch['mask'], patches) & (weight > 0)[:, None]
        sums['object'] = on_object.sum()
    for stage, there in enumerate(map(patch_shares, out['kept'], out['token_of_patch']), 1):
        sums[f'object_kept_{stage}'] = (there * on_object).sum()
        sums[f'random_kept_{stage}'] = (there.mean(1) * weight).sum()
    return {name: float(value) for name, value in sums.items()}


def object_patches(mask: np.ndarray, patches: int) -> np.ndarray:
    """Patches on the object: bool [B, S, S] to bool [B, N], row-major."""
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
