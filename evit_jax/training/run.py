"""A run laid out from its config before any long work: model, data, plans, optimizer. Wrong values stop here."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from evit_jax import models, parallel
from evit_jax.data import mixing, order, pipeline
from evit_jax.data.failures import Failures
from evit_jax.data.sources import Source
from evit_jax.data.token_targets import TokenTargets
from evit_jax.models import Model
from evit_jax.tokens import reducers
from evit_jax.tokens.plan import TokenPlan, make_plan
from evit_jax.tokens.schedule import KeepSchedule, Stage, stages
from evit_jax.training import best, inputs, profile, steps, weights, writers
from evit_jax.training import optimizer as optimizers
from evit_jax.training.checkpoints import newest_step
from evit_jax.training.state import TrainState, create_state

_DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}


class Run(NamedTuple):
    """What training and evaluation need, made from a config."""

    config: Any
    mesh: Mesh
    model: Model
    train_source: Source
    test_source: Source
    plan: TokenPlan                # of the base rate: what is evaluated
    stages: tuple[Stage, ...]
    total_steps: int
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    prepare: Callable
    targets: TokenTargets | None   # of the tokens of images that are trained on

    @property
    def patches(self) -> int:
        return self.plan.patches

    @property
    def steps_per_epoch(self) -> float:
        return _steps_per_epoch(self.config, self.train_source)

    @property
    def about(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {'config': self.config.to_dict(), 'class_names': list(self.train_source.class_names)}

    def new_state(self) -> TrainState:
        """The state before the first step, on all devices, from the weights of `config.init_from` if it names any.

        Raises:
          ValueError: those weights cannot be read or do not fit.
        """
        config, whole = self.config, parallel.replicated(self.mesh)
        params = jax.jit(self.model.init, out_shardings=whole)(jax.random.key(config.seed))
        if config.init_from:
            params = weights.start_from(config.init_from, params, prefix=self.model.shape.prefix, ema=config.init_ema,
                                        class_names=self.train_source.class_names)
        return jax.jit(self._state_of, out_shardings=self.shardings())(params)

    def trained_state(self, workdir: str | os.PathLike) -> TrainState:
        """Step, weights and average of a run's newest checkpoint, on all devices, and nothing that only training needs.

        Raises:
          ValueError: no readable checkpoint, or weights that do not fit.
        """
        params, ema, step = weights.read(workdir, self._shapes().params)
        place = jax.jit(lambda tree: tree, out_shardings=self.shardings().params)
        return TrainState(jnp.int32(step), place(params), None if ema is None else place(ema), ())

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                            self._shapes(), self.shardings())

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and sharding of a batch."""
        batch, size = self.config.batch_size, self.config.model.image_size
        shapes = {'image': ((batch, size, size, 3), np.uint8), 'label': ((batch,), np.int32)}
        if self.targets:
            shapes |= {name: ((batch, *row), dtype) for name, (row, dtype) in self.targets.shapes.items()}
        place = parallel.split_batch(self.mesh)
        return {name: jax.ShapeDtypeStruct(*of, sharding=place) for name, of in shapes.items()}

    def shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return parallel.state_shardings(self._shapes(), self.mesh, self.config.sharding)

    def train_step(self) -> Callable:
        """The training step, jitted."""
        config = self.config
        mix = functools.partial(mixing.mix_batch, mixing=inputs.mixing_of(config), groups=self.mesh.size,
                                classes=self.model.shape.classes)
        step = steps.make_train_step(
            self._placed_model(), self.optimizer, self.schedule, prepare=self.prepare, mix=mix,
            ema_decay=config.ema_decay, seed=config.seed, updates_every=config.optimizer.accumulate,
            skip_nonfinite=config.nonfinite == 'skip')
        state, whole, batch = self.shardings(), parallel.replicated(self.mesh), parallel.split_batch(self.mesh)
        return jax.jit(parallel.seen(self.mesh, step), static_argnums=2, in_shardings=(state, batch),
                       out_shardings=(state, whole), donate_argnums=0)

    def eval_step(self) -> Callable:
        """The evaluation step, jitted."""
        step = steps.make_eval_step(self._placed_model(), prepare=self.prepare)
        batch = parallel.split_batch(self.mesh)
        return jax.jit(parallel.seen(self.mesh, step), static_argnums=2,
                       in_shardings=(self.shardings().params, batch), out_shardings=batch)

    def _placed_model(self):
        """The model with the logits where their images are: of a divided head, XLA would divide them by class."""

        def apply(*inputs):
            logits, seen = self.model.apply(*inputs)
            return jax.lax.with_sharding_constraint(logits, parallel.split_batch(self.mesh)), seen

        return self.model._replace(apply=apply)

    def _state_of(self, params):
        return create_state(params, self.optimizer, ema=self.config.ema_decay > 0)

    def _shapes(self):
        return jax.eval_shape(self._state_of, jax.eval_shape(self.model.init, jax.random.key(0)))


def lay_out(config: Any, *, trained_size: int | None = None, mesh: Mesh | None = None,
            sources: tuple[Source, Source] | None = None) -> Run:
    """Makes the run of a config.

    Args:
      trained_size: image size that the position embeddings were trained for, where it is not the config's.
      mesh: of devices that are not this machine's; where it is not given, of all that are.
      sources: to train on and to evaluate on, in place of those that the config names.

    Raises:
      ValueError: a value that cannot work; names it, its limit and the way out.
    """
    mesh = mesh or parallel.data_mesh(config.batch_size)
    train_source, test_source = sources or _open_sources(config)
    if not config.model.classes:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.model.classes = train_source.num_classes
    shape, plan_at = _shape_and_plans(config, trained_size)
    total_steps = order.train_steps(len(train_source), config.batch_size, config.epochs, config.data.repeats)
    per_epoch = _steps_per_epoch(config, train_source)
    keep = KeepSchedule(round(config.keep.start_epoch * per_epoch), round(config.keep.shrink_epochs * per_epoch),
                        config.keep.levels)
    updates = max(total_steps // config.optimizer.accumulate, 1)
    schedule = optimizers.learning_rate(
        lr=config.optimizer.lr, batch_size=config.batch_size * config.optimizer.accumulate, total_steps=updates,
        warmup_steps=round(config.optimizer.warmup_epochs * per_epoch / config.optimizer.accumulate),
        warmup_lr=config.optimizer.warmup_lr, min_lr=config.optimizer.min_lr)
    optimizer = optimizers.adamw(schedule, weight_decay=config.optimizer.weight_decay, b2=config.optimizer.b2,
                                 clip_norm=config.optimizer.clip_norm, accumulate=config.optimizer.accumulate)
    model = models.create(shape, drop_path=config.model.drop_path, dtype=_DTYPES[config.model.dtype])
    prepare = functools.partial(steps.normalise, mean=tuple(config.data.mean), std=tuple(config.data.std))
    targets = inputs.token_targets(config, train_source, math.isqrt(plan_at(1.0).patches))
    return Run(config, mesh, model, train_source, test_source, plan_at(1.0), stages(keep, plan_at, total_steps),
               total_steps, optimizer, schedule, prepare, targets)


def check_start(config: Any, workdir: str | os.PathLike) -> None:
    """Raises a ValueError if a run that begins in this workdir lacks the weights that it is to begin from."""
    if newest_step(workdir) is not None:
        return
    if config.init_from is None:
        raise ValueError('this recipe starts from trained weights: give --config.init_from=WORKDIR of the run that '
                         'has them, or --config.init_from= to start from nothing')
    if config.init_from and newest_step(config.init_from) is None:
        raise ValueError(f'config.init_from={config.init_from} holds no checkpoint: give the workdir of a trained run')


def train_batches(run: Run, start_step: int) -> pipeline.Batches:
    """The training batches from a step on; call `close()` on them."""
    config = run.config
    return pipeline.train_batches(
        run.train_source, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed,
        transform=inputs.train_transform(config), repeats=config.data.repeats, targets=run.targets,
        start_step=start_step, num_workers=config.data.workers, process_index=jax.process_index(),
        process_count=jax.process_count())


def held_out_batches(run: Run) -> pipeline.Batches:
    """The test split once; call `close()` on it."""
    return pipeline.eval_batches(
        run.test_source, batch_size=run.config.batch_size, transform=inputs.eval_transform(run.config),
        num_workers=run.config.data.workers, process_index=jax.process_index(), process_count=jax.process_count())


def failures(run: Run, source: Source) -> Failures:
    """Counts what cannot be read of a source."""
    return Failures(run.config.data.max_failed, len(source))


def keep_rate(run: Run, stage: Stage) -> float:
    """The rate of a stage, for the log; with several rates the first, with token counts their share."""
    keep = run.config.keep
    if keep.tokens:
        return 1 - (1 - keep.tokens[0] / run.patches) * stage.progress
    return 1 - (1 - (keep.rates[0] if keep.rates else keep.rate)) * stage.progress


def _open_sources(config):
    train, test = inputs.open_sources(config)
    logging.info('data: %s examples to train on, %s to evaluate on, %d classes', f'{len(train):,}', f'{len(test):,}',
                 train.num_classes)
    return train, test


def _steps_per_epoch(config, train_source):
    return order.epoch_samples(len(train_source), config.data.repeats) / config.batch_size


def _shape_and_plans(config, trained_size=None):
    shape = dataclasses.replace(models.named_shape(config.model.name), classes=config.model.classes,
                                distilled=config.model.distilled,
                                image_size=trained_size or config.model.image_size)
    return shape, _plan_at(config, shape.patches(config.model.image_size), shape.depth)


def _plan_at(config, patches, depth):
    """Progress of the schedule -> plan; at 1 the config's own."""
    keep, at = config.keep, tuple(config.model.reduce_at)
    make = functools.partial(make_plan, patches, depth, reduce_at=at, fuse=config.model.fuse,
                             reducer=reducers.named(config.reducer.name))
    rates = tuple(keep.rates) or (keep.rate,) * len(at)
    final = make(tokens=tuple(keep.tokens)) if keep.tokens else make(rate=rates)
    if keep.tokens:
        entering, rates = (patches, *final.counts[:-1]), []
        for block in sorted(at):
            rates.append((final.keep[block] or entering[block]) / entering[block])
    return lambda progress: final if progress == 1 else make(rate=tuple(1 - (1 - r) * progress for r in rates))


def check(config: Any) -> None:
    """Raises a ValueError for a value outside its limits; reads and writes nothing."""
    share, count, amount = (0, 1), (1, math.inf), (0, math.inf)
    limits = {
        'batch_size': count, 'epochs': count, 'label_smoothing': (0, 0.999), 'ema_decay': (0, 0.999999),
        'model.drop_path': (0, 0.999), 'model.classes': (2 if config.model.classes else 0, math.inf),
        'keep.start_epoch': amount, 'keep.shrink_epochs': amount, 'data.repeats': count, 'data.workers': amount,
        'data.flip': share, 'data.eval_crop': share, 'data.max_failed': share, 'mixing.erase': share,
        'mixing.mixup': amount, 'mixing.cutmix': amount, 'mixing.switch': share, 'optimizer.lr': amount,
        'optimizer.warmup_epochs': amount, 'optimizer.warmup_lr': amount, 'optimizer.min_lr': amount,
        'optimizer.weight_decay': amount, 'optimizer.b2': (0, 0.9999999), 'optimizer.clip_norm': amount,
        'optimizer.accumulate': count, 'log.every': count, 'log.eval_epochs': (1e-9, math.inf),
        'log.pictures': amount, 'checkpoint.every': count, 'checkpoint.minutes': amount, 'checkpoint.keep': count}
    for key, (low, high) in limits.items():
        value = functools.reduce(lambda node, part: node[part], key.split('.'), config)
        if not low <= value <= high:
            raise ValueError(f'config.{key}={value} is outside [{low}, {high}]')
    for key, lengths in {'crop': (0, 2), 'ratio': (2,), 'mean': (3,), 'std': (3,)}.items():
        if len(config.data[key]) not in lengths:
            raise ValueError(f'config.data.{key}={tuple(config.data[key])} has {len(config.data[key])} values, not '
                             f'{" or ".join(map(str, lengths))}')
    averaged = config.ema_decay > 0
    for key, value, known in (
            ('model.dtype', config.model.dtype, _DTYPES), ('sharding', config.sharding, parallel.SHARDINGS),
            ('log.writer', config.log.writer, writers.KINDS), ('nonfinite', config.nonfinite, steps.NONFINITE),
            ('checkpoint.best', config.checkpoint.best, ('', *best.METRICS) if averaged else ('', best.METRICS[0]))):
        if value not in known:
            raise ValueError(f'config.{key}={value!r} is unknown: there are {", ".join(filter(None, known))}')
    profile.steps_of(config.profile_steps)
    inputs.train_transform(config)
    inputs.eval_transform(config)
    _, plan_at = _shape_and_plans(config)
    plan_at(1.0)
    stages(KeepSchedule(config.keep.start_epoch, config.keep.shrink_epochs, config.keep.levels), plan_at, total_steps=1)
    parallel.data_mesh(config.batch_size)
