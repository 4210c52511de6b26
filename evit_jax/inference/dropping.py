"""The dropping experiment: accuracy against the fraction of patches removed before the first block."""

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data import pipeline
from evit_jax.data.names import in_one_line
from evit_jax.data.progress import Progress
from evit_jax.data.sources import Source
from evit_jax.data.transforms.decode import SUFFIXES
from evit_jax.inference.compiled import ReplicatedParams
from evit_jax.inference.held_out import spread
from evit_jax.inference.keep_rates import ranking_plan
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.training import step as steps
from evit_jax.training.evaluation import object_patches

ORDERS = ('on the object first', 'off the object first', 'at random', 'least attended first', 'most attended first')
_MAX_TRIED = 1000  # images tried until one is readable


class DroppingResult(NamedTuple):
    """Accuracy by order and by fraction of patches removed."""

    shares: tuple[float, ...]         # fractions of the patches removed
    accuracy: dict[str, np.ndarray]   # top-1 accuracy for each share, by order: [number of shares]
    images: int                       # number of images with an object
    on_object: float                  # fraction of the patches that are on the object


class MaskedSource:
    """Adds masks from files to a source. The file of a mask is `folder/<path or id of the image>`, in any image format.
    """

    def __init__(self, source: Source, folder: str | os.PathLike):
        self._source, self._folder = source, pathlib.Path(folder).expanduser()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = self._source[index]
        stem = self._folder / example.get('path', example['id'])
        stem = stem.with_suffix('') if stem.suffix.lower() in SUFFIXES else stem
        mask = next((file for suffix in SUFFIXES if (file := stem.with_name(stem.name + suffix)).is_file()), None)
        if mask is None:
            raise FileNotFoundError(f'there is no mask {in_one_line(str(stem))}.png')
        return example | {'mask': mask.read_bytes()}


class Subset:
    """The examples of a source at some indices."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._indices[index]]


def check_masks(source: Source) -> None:
    """Checks that the first readable image has a mask. At most 1,000 evenly spaced images are tried.

    Raises:
      ValueError: the image has no mask, or no image is readable.
    """
    indices, problem = spread(len(source), _MAX_TRIED), None
    for index in indices:
        try:
            example = source[index]
        except (OSError, ValueError) as error:
            problem = error
            continue
        if 'mask' in example:
            return
        raise ValueError('the data have no masks: give --masks DIR with one for each image, white on the object')
    raise ValueError(f'none of {len(indices):,} images tried can be used, the last one as: {problem}')


def drop_patches(loaded: LoadedModel, source: Source, *, shares: Sequence[float], rate: float = 1.0, seed: int = 0,
                 batch_size: int = 128) -> DroppingResult:
    """Evaluates a model with an increasing fraction of the patches removed, in each order of `ORDERS`.

    After all patches on the object (or off the object) are removed, the remaining patches follow in random order.
    Images without an object are skipped. The orders by attention use the class attention of the dense model, averaged
    over the blocks that reduce, or over all blocks if none does.

    Args:
      loaded: the model.
      source: examples with masks.
      shares: fractions of the patches to remove, in [0, 1); at least one patch is kept.
      rate: keep rate of each reduction in the model.
      seed: seed of the random order; image i has the same draws in every batch.
      batch_size: number of images in a batch.

    Raises:
      ValueError: a share or rate is out of range, no image has an object, or the model has no class token or classes.
      FloatingPointError: logits are not finite.
    """
    loaded.check_has_classes()
    if not loaded.config.class_token:
        raise ValueError(f'the model in {loaded.path or loaded.name} has no class token, and two of the orders use its '
                         'attention: give a model with a class token')
    experiment = _Experiment(loaded, shares, rate, seed, batch_size)
    batches = pipeline.eval_batches(source, batch_size=batch_size, transform=loaded.eval_transform())
    failed: list[str] = []
    progress = Progress('dropping patches', len(source) * experiment.num_passes, 'predictions')
    try:
        for batch in batches:
            failed += batch['failed'].tolist()
            experiment.add(batch, progress)
    finally:
        batches.close()
    if failed:
        logging.warning('%d images are left out, as they cannot be read; the first: %s', len(failed), failed[0])
    if not experiment.num_images:
        raise ValueError(f'none of {len(source)} images counts: {failed[0] if failed else "no mask shows an object"}')
    if without := len(source) - experiment.num_images - len(failed):
        logging.warning('%d images are left out, as their masks show no object', without)
    return experiment.result()


class _Experiment:
    """Accumulates the results of the experiment over batches."""

    def __init__(self, loaded: LoadedModel, shares: Sequence[float], rate: float, seed: int, batch_size: int):
        if wrong := [share for share in shares if not 0 <= share < 1]:
            raise ValueError(f'a share of {wrong[0]:g} of the patches cannot be dropped: give shares in [0, 1)')
        self._patches, self._seed = loaded.config.patches(loaded.image_size), seed
        self._counts = sorted({min(round(share * self._patches), self._patches - 1) for share in shares})
        budget = loaded.budget
        self._plans = [make_plan(self._patches - count, loaded.config.depth, rate=rate, reduce_at=budget.reduce_at,
                                 fuse=budget.fuse, reducer=budget.reducer) for count in self._counts]
        self._programs = _Programs(loaded, batch_size)
        self._correct = {order: np.zeros(len(self._counts)) for order in ORDERS}
        self.num_images, self._on_object = 0, 0
        self.num_passes = 1 + sum(len(ORDERS) if count else 1 for count in self._counts)

    def add(self, batch: dict[str, np.ndarray], progress: Progress) -> None:
        """Evaluates a batch for every share and order."""
        if 'mask' not in batch:
            return
        on_object = object_patches(batch['mask'], self._patches)
        counted = (batch['weight'] > 0) & on_object.any(1)
        if not counted.any():
            return
        images, done = self._programs.put(batch['image']), (batch['index'] >= 0).sum()
        draws = np.array([np.random.default_rng([self._seed, max(index, 0)]).random(self._patches)
                          for index in batch['index'].tolist()])
        orders = _orders(on_object, self._programs.attention(images), draws)
        self.num_images += int(counted.sum())
        self._on_object += on_object[counted].sum()
        progress.add(done)
        for number, (count, plan) in enumerate(zip(self._counts, self._plans)):
            for order, ids in orders.items():
                if count or order == ORDERS[0]:  # with no patch removed, all orders are the same
                    predicted = self._programs.predict(images, ids[:, count:], plan)
                    progress.add(done)
                self._correct[order][number] += (predicted == batch['label'])[counted].sum()

    def result(self) -> DroppingResult:
        """Returns the result over all batches so far."""
        return DroppingResult(
            tuple(count / self._patches for count in self._counts),
            {order: correct / self.num_images for order, correct in self._correct.items()}, self.num_images,
            self._on_object / (self.num_images * self._patches))


def _orders(on_object: np.ndarray, attention: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Returns a dict from order to the ids of all patches [B, N]. The first patch is removed first."""
    ranks = draws - on_object, draws + on_object, draws, attention, -attention
    return {order: rank.argsort(1, kind='stable').astype(np.int32) for order, rank in zip(ORDERS, ranks, strict=True)}


class _Programs:
    """The jitted functions of the experiment. A program is compiled for each number of patches."""

    def __init__(self, loaded: LoadedModel, batch_size: int):
        model = models.create(loaded.config, dtype=jnp.dtype(loaded.dtype), modules=loaded.modules)
        depth = loaded.config.depth
        dense = make_plan(loaded.config.patches(loaded.image_size), depth, reduce_at=())
        self._ranking = ranking_plan(dense, loaded.budget.reduce_at or range(depth))
        self._replicated = ReplicatedParams(loaded.params, batch_size)
        normalise = functools.partial(steps.normalise, mean=loaded.mean, std=loaded.std)

        def class_attention(params, images, plan):
            _, outputs = model.apply(params, normalise(images), plan)
            return outputs['patch_ids'], outputs['class_attention']

        def predict(params, images, visible, plan):
            logits, _ = model.apply(params, normalise(images), plan, visible=visible)
            return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)

        self._class_attention = self._replicated.jit(class_attention, static_argnums=2)
        self._predict = self._replicated.jit(predict, static_argnums=3)

    def put(self, rows: np.ndarray) -> jax.Array:
        """Puts one row per image on the devices."""
        return self._replicated.put(rows)

    def attention(self, images: jax.Array) -> np.ndarray:
        """Returns the class attention to each patch, [B, N], summed over the reducing blocks."""
        total = 0
        outputs = jax.tree.map(np.asarray, self._class_attention(self._replicated.params, images, self._ranking))
        for patch_ids, attention in zip(*outputs):
            total = total + np.take_along_axis(attention, patch_ids.argsort(1), axis=1)
        return total

    def predict(self, images: jax.Array, visible: np.ndarray, plan: TokenPlan) -> np.ndarray:
        """Returns the classes [B] that are predicted from only the visible patches [B, K].

        Raises:
          FloatingPointError: logits are not finite.
        """
        classes = np.asarray(self._predict(self._replicated.params, images, self.put(np.sort(visible, 1)), plan))
        if (classes < 0).any():
            raise FloatingPointError(f'the logits of {(classes < 0).sum()} of {len(classes)} images are not finite: '
                                     'the computation overflows')
        return classes
