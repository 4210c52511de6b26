"""Which patches a model can do without: accuracy against the share of them that is removed before the first block."""

import functools
import math
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
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.inference.held_out import spread
from evit_jax.inference.looking import ranking_plan
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.runtime import sharding
from evit_jax.training import step
from evit_jax.training.evaluation import object_patches

ORDERS = ('on the object first', 'off the object first', 'at random', 'least attended first', 'most attended first')
_TRIED = 1000  # images, until one can be read


class Dropped(NamedTuple):
    """What was found; shares are fractions of 1."""

    shares: tuple[float, ...]         # of the patches removed, exact
    accuracy: dict[str, np.ndarray]   # order -> [shares], top-1
    images: int                       # that counted
    on_object: float                  # share of the patches that are on the object


class Masked:
    """A source whose masks are files: `folder/<path or id of the image>`, with any suffix of an image."""

    def __init__(self, source: Source, folder: str | os.PathLike):
        self._source, self._folder = source, pathlib.Path(folder).expanduser()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = self._source[index]
        place = self._folder / example.get('path', example['id'])
        place = place.with_suffix('') if place.suffix.lower() in SUFFIXES else place
        found = next((file for suffix in SUFFIXES if (file := place.with_name(place.name + suffix)).is_file()), None)
        if found is None:
            raise FileNotFoundError(f'there is no mask {in_one_line(str(place))}.png')
        return example | {'mask': found.read_bytes()}


class Some:
    """A source of some examples of another one."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict:
        return self._source[self._indices[index]]


def check_masks(source: Source) -> None:
    """Raises a ValueError unless the first of its images that can be read has a mask; tries a thousand of them."""
    tried, problem = spread(len(source), _TRIED), None
    for index in tried:
        try:
            example = source[index]
        except (OSError, ValueError) as error:
            problem = error
            continue
        if 'mask' in example:
            return
        raise ValueError('the data have no masks: give --masks DIR with one for each image, white on the object')
    raise ValueError(f'none of {len(tried):,} images tried can be used, the last one as: {problem}')


def drop_patches(trained: LoadedModel, source: Source, *, shares: Sequence[float], rate: float = 1.0, seed: int = 0,
                 batch_size: int = 128) -> Dropped:
    """Evaluates with a growing share of the patches removed, chosen in each of `ORDERS`.

    Where the object (or the rest) is used up, the others follow at random. Images without an object are left out. The
    attention is that of the class token, where nothing is dropped, averaged over the blocks that reduce (over all, if
    none does).

    Args:
      source: with masks.
      shares: of the patches, in [0, 1); at least one patch stays.
      rate: kept by each reduction within the model.
      seed: of what is random; image i has the same draws whatever the batch.

    Raises:
      ValueError: a share or rate out of range, or no image with an object.
      FloatingPointError: logits are not finite.
    """
    patches = trained.config.patches(trained.image_size)
    if wrong := [share for share in shares if not 0 <= share < 1]:
        raise ValueError(f'a share of {wrong[0]:g} of the patches cannot be dropped: give shares in [0, 1)')
    counts = sorted({min(round(share * patches), patches - 1) for share in shares})
    plans = {count: make_plan(patches - count, trained.config.depth, rate=rate, reduce_at=trained.budget.reduce_at,
                              fuse=trained.budget.fuse, reducer=trained.budget.reducer) for count in counts}
    run = _Programs(trained, batch_size)
    batches = pipeline.eval_batches(source, batch_size=batch_size, transform=EvalTransform(
        trained.image_size, crop=trained.eval_crop))
    right, images, objects, failed = {order: np.zeros(len(counts)) for order in ORDERS}, 0, 0, []
    passes = 1 + sum(len(ORDERS) if count else 1 for count in counts)
    progress = Progress('dropping patches', len(source) * passes, 'predictions')
    try:
        for batch in batches:
            failed += batch['failed'].tolist()
            on_object = object_patches(batch['mask'], patches) if 'mask' in batch else np.zeros((batch_size, 1), bool)
            counted = (batch['weight'] > 0) & on_object.any(1)
            if not counted.any():
                continue
            placed = run.place(batch['image'])
            orders = _orders(on_object, run.attention(placed), _draws(seed, batch['index'], patches))
            images, objects = images + counted.sum(), objects + on_object[counted].sum()
            progress.add((batch['index'] >= 0).sum())
            for place, count in enumerate(counts):
                for order, ids in orders.items():
                    if count or order == ORDERS[0]:  # of nothing every order is the same
                        predicted = run.predict(placed, ids[:, count:], plans[count])
                        progress.add((batch['index'] >= 0).sum())
                    right[order][place] += (predicted == batch['label'])[counted].sum()
    finally:
        batches.close()
    if failed:
        logging.warning('%d images are left out, as they cannot be read; the first: %s', len(failed), failed[0])
    if not images:
        raise ValueError(f'none of {len(source)} images counts: {failed[0] if failed else "no mask shows an object"}')
    if without := len(source) - images - len(failed):
        logging.warning('%d images are left out, as their masks show no object', without)
    return Dropped(tuple(count / patches for count in counts), {order: sums / images for order, sums in right.items()},
                   int(images), objects / (images * patches))


def _draws(seed: int, indices: np.ndarray, patches: int) -> np.ndarray:
    """[B, N] in [0, 1), by the number of the image."""
    return np.array([np.random.default_rng([seed, max(index, 0)]).random(patches) for index in indices.tolist()])


def _orders(on_object: np.ndarray, attention: np.ndarray, draws: np.ndarray) -> dict[str, np.ndarray]:
    """For each order all patches [B, N], the first to be dropped in front."""
    first = draws - on_object, draws + on_object, draws, attention, -attention
    return {order: rank.argsort(1, kind='stable').astype(np.int32) for order, rank in zip(ORDERS, first, strict=True)}


class _Programs:
    """The model, jitted: a program for each number of patches that stay."""

    def __init__(self, trained: LoadedModel, batch_size: int):
        model = models.create(trained.config, dtype=jnp.dtype(trained.dtype), modules=trained.modules)
        devices = jax.local_devices()
        self._mesh = sharding.data_mesh(batch_size, devices[:math.gcd(batch_size, len(devices))])
        self._params = jax.device_put(trained.params, sharding.replicated(self._mesh))
        depth = trained.config.depth
        dense = make_plan(trained.config.patches(trained.image_size), depth, reduce_at=())
        self._whole = ranking_plan(dense, trained.budget.reduce_at or range(depth))
        prepare = functools.partial(step.normalise, mean=trained.mean, std=trained.std)

        def attend(params, images, plan):
            return [model.apply(params, prepare(images), plan)[1][name] for name in ('patch_ids', 'class_attention')]

        def predict(params, images, visible, plan):
            logits = model.apply(params, prepare(images), plan, visible=visible)[0]
            return jnp.where(jnp.isfinite(logits).all(-1), logits.argmax(-1), -1)

        jitted = functools.partial(jax.jit, out_shardings=sharding.batch_sharding(self._mesh))
        self._attend = jitted(sharding.with_mesh(self._mesh, attend), static_argnums=2)
        self._predict = jitted(sharding.with_mesh(self._mesh, predict), static_argnums=3)

    def place(self, rows: np.ndarray) -> jax.Array:
        return sharding.shard_batch({'rows': rows}, self._mesh)['rows']

    def attention(self, images: jax.Array) -> np.ndarray:
        """[B, N], by patch."""
        total = 0
        for patch, attention in zip(*jax.tree.map(np.asarray, self._attend(self._params, images, self._whole))):
            total = total + np.take_along_axis(attention, patch.argsort(1), axis=1)
        return total

    def predict(self, images: jax.Array, visible: np.ndarray, plan: TokenPlan) -> np.ndarray:
        """Classes [B] by the visible patches [B, K].

        Raises:
          FloatingPointError: logits are not finite.
        """
        classes = np.asarray(self._predict(self._params, images, self.place(np.sort(visible, 1)), plan))
        if (classes < 0).any():
            raise FloatingPointError(f'the logits of {(classes < 0).sum()} of {len(classes)} images are not finite: '
                                     'the computation overflows')
        return classes
