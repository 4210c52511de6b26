"""A run laid out from its config before any long work: model, data, plans, optimizer. Wrong values stop here."""

import functools
import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from evit_jax import models
from evit_jax.checkpoints import open_defaults, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.state import TrainState, create_state
from evit_jax.data import order, pipeline
from evit_jax.data.failures import Failures
from evit_jax.data.sources import Source, split_of
from evit_jax.data.token_labels import mixtoken
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms import mixing
from evit_jax.models import Model
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.budget import TokenBudget, check_trained_blocks
from evit_jax.reduction.plan import TokenPlan, by_depth
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import NO_MODULES, Modules
from evit_jax.reduction.schedule import KeepSchedule, Stage, stages
from evit_jax.runtime import agreement, machine, sharding
from evit_jax.training import inputs, teaching
from evit_jax.training import optimizer as optimizers
from evit_jax.training import step as steps
from evit_jax.training.distillation import Teacher
from evit_jax.training.objectives import Targets


class Experiment(NamedTuple):
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
    offset: int = 0                # samples by which step s begins after sample s * batch_size (see `positions`)

    @property
    def patches(self) -> int:
        return self.plan.patches

    @property
    def steps_per_epoch(self) -> float:
        return _steps_per_epoch(self.config, self.train_source)

    def epoch(self, step: int) -> float:
        """The epochs that are done at a step."""
        return (step + self.offset / self.config.batch_size) / self.steps_per_epoch

    def moved(self, offset: int) -> 'Experiment':
        """The same run where step s begins `offset` samples after sample s * batch_size."""
        return self if offset == self.offset else setup(
            self.config, mesh=self.mesh, sources=(self.train_source, self.test_source), offset=offset)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {'config': self.config.to_dict(), 'class_names': list(self.train_source.class_names)}

    def new_state(self) -> TrainState:
        """The state before the first step, on all devices, from the weights of `config.init_from` if it names any.

        Raises:
          ValueError: those weights cannot be read or do not fit.
        """
        config, whole = self.config, sharding.replicated(self.mesh)
        params = jax.jit(self.model.init, out_shardings=whole)(jax.random.key(config.seed))
        if config.init_from:
            weights.check_values(config.init_from, self.model.config)
            params = weights.same_weights(config.init_from, functools.partial(
                weights.start_from, config.init_from, params, prefix=self.model.config.num_prefix_tokens,
                ema=config.init_ema, class_names=self.train_source.class_names))
        return jax.jit(self._state_of, out_shardings=self.shardings())(params)

    def trained_state(self, workdir: str | os.PathLike) -> TrainState:
        """Step, weights and average of a run's newest checkpoint, on all devices, and nothing that only training needs.

        Raises:
          ValueError: no readable checkpoint, or weights that do not fit.
        """
        params, ema, step = weights.same_weights(
            workdir, functools.partial(weights.read, workdir, self._shapes().params))
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
        place = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(*of, sharding=place) for name, of in shapes.items()}

    def shardings(self) -> TrainState:
        """Where each array of the state lies."""
        return sharding.state_shardings(self._shapes(), self.mesh, self.config.sharding)

    def read_teacher(self) -> Teacher | None:
        """The teacher, with its parameters on all devices; None where the config has none.

        Raises:
          ValueError: it cannot be read, or is none for this run.
        """
        config = self.config
        found = weights.same_weights(config.teacher.path or config.init_from, functools.partial(
            teaching.read_teacher, config, self.plan, self.model.config.width, self.train_source.class_names,
            machine.DTYPES[config.model.dtype]), lambda teacher: teacher and teacher.arrays)
        if found is None:
            return None
        found = found._replace(digest=agreement.digest_tree(found.arrays))
        places = sharding.state_shardings(found.params, self.mesh, config.sharding)
        return found._replace(model=self._placed(found.model),
                              params=jax.jit(lambda tree: tree, out_shardings=places)(found.params))

    def train_step(self, teacher: Teacher | None = None) -> Callable:
        """The training step, jitted; with a teacher it takes that one's parameters last."""
        config, model = self.config, self._placed(self.model)
        if teacher is None and config.distill.kind != 'none':
            raise ValueError(f'config.distill.kind={config.distill.kind} needs a teacher, and there is none here: give '
                             '--config.distill.kind=none')
        teach = teacher and functools.partial(teacher.teach, mean=tuple(config.data.mean), std=tuple(config.data.std))
        step = steps.make_train_step(
            model, self.optimizer, self.schedule, prepare=self.prepare, mix=self._mix, teach=teach,
            objective=functools.partial(teaching.objective, config), ema_decay=config.ema_decay,
            seed=config.seed, patch_tokens=teaching.compares_tokens(config),
            updates_every=config.optimizer.accumulate, skip_nonfinite=config.nonfinite == 'skip')
        state, whole, batch = self.shardings(), sharding.replicated(self.mesh), sharding.batch_sharding(self.mesh)
        taught_by = [jax.tree.map(lambda leaf: leaf.sharding, teacher.params)] if teacher else []
        return jax.jit(sharding.with_mesh(self.mesh, step), static_argnums=2, in_shardings=(state, batch, *taught_by),
                       out_shardings=(state, whole), donate_argnums=0)

    def eval_step(self) -> Callable:
        """The evaluation step, jitted."""
        step = steps.make_eval_step(self._placed(self.model), prepare=self.prepare)
        batch = sharding.batch_sharding(self.mesh)
        return jax.jit(sharding.with_mesh(self.mesh, step), static_argnums=2,
                       in_shardings=(self.shardings().params, batch), out_shardings=batch)

    def _placed(self, model):
        """A model that has its weights whole where it uses them: of few tokens, XLA would exchange these instead."""

        def apply(params, *inputs, **asked):
            whole = jax.lax.with_sharding_constraint(params, sharding.replicated(self.mesh))
            return model.apply(whole, *inputs, **asked)

        return model._replace(apply=apply)

    def _mix(self, images, batch, key):
        if self.targets:
            erase_key, swap_key = jax.random.split(key)
            if self.config.mixing.erase:
                images = mixing.random_erasing(images, erase_key, self.config.mixing.erase)
            label, tokens, swap = mixtoken.mix_batch(
                batch, swap_key, patches=self.patches, classes=self.model.config.classes, groups=self.mesh.size,
                smoothing=self.config.label_smoothing)
            return steps.Mixed(images, Targets(label, tokens), {'swap': swap})
        images, targets = mixing.mix_batch(images, batch['label'], key, mixing=inputs.mixing_settings(self.config),
                                           groups=self.mesh.size, classes=self.model.config.classes)
        return steps.Mixed(images, Targets(targets))

    def _state_of(self, params):
        return create_state(params, self.optimizer, ema=self.config.ema_decay > 0)

    def _shapes(self):
        return jax.eval_shape(self._state_of, jax.eval_shape(self.model.init, jax.random.key(0)))


def setup(config: Any, *, trained: dict[str, Any] | None = None, mesh: Mesh | None = None,
            sources: tuple[Source, Source] | None = None, offset: int = 0) -> Experiment:
    """Makes the run of a config.

    Args:
      trained: the flat config that the model was trained with, where it is not this one; it decides image size and
        predictors of what is trained.
      mesh: of devices that are not this machine's; where it is not given, of all that are.
      sources: to train on and to evaluate on, in place of those that the config names.
      offset: samples by which step s begins after sample s * batch_size.

    Raises:
      ValueError: a value that cannot work; names it, its limit and the way out.
    """
    mesh = mesh or sharding.data_mesh(config.batch_size)
    config = open_defaults.resolve(config, platform=mesh.devices.flat[0].platform)
    train_source, test_source = sources or _open_sources(config)
    if not config.model.classes:
        config = config.copy_and_resolve_references()
        with config.unlocked():
            config.model.classes = train_source.num_classes
    model_config, plan_at, modules = config_and_plans(config, trained)
    batch_size, per_epoch = config.batch_size, _steps_per_epoch(config, train_source)
    whole, total_steps = (order.train_steps(len(train_source), batch_size, config.epochs, config.data.repeats, samples)
                          for samples in (0, offset))
    keep = KeepSchedule(round(config.keep.start_epoch * per_epoch), round(config.keep.shrink_epochs * per_epoch),
                        config.keep.levels)
    programs = tuple(stage._replace(start=max(-((offset - stage.start * batch_size) // batch_size), 0))
                     for stage in stages(keep, lambda progress: plan_at(progress).in_training(), whole))
    optimizer, schedule = optimizers.from_config(config.optimizer, batch_size, whole, per_epoch, offset / batch_size)
    model = models.create(model_config, drop_path=config.model.drop_path, dtype=machine.DTYPES[config.model.dtype],
                          remat=config.remat, gather_impl=config.model.gather_impl, modules=modules)
    prepare = functools.partial(steps.normalise, mean=tuple(config.data.mean), std=tuple(config.data.std))
    targets = inputs.token_targets(config, train_source, plan_at(1.0).patches)
    return Experiment(config, mesh, model, train_source, test_source, plan_at(1.0), programs, max(total_steps, 0),
                      optimizer, schedule, prepare, targets, offset)


def apply_plan(config: Any, planned: PlanFile, explicit: Collection[str] = ()) -> Any:
    """The config with a plan from a file in place of what it says of blocks, rates and fusion.

    Args:
      explicit: keys set on the command line.

    Raises:
      ValueError: the plan is for another model, or an explicit key has another value than the plan.
    """
    before = workdirs.flat(config.to_dict())
    model_config = models.get_config(config.model.name)
    planned.check(config.model.name, model_config.patches(config.model.image_size), model_config.depth)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(reduce_at=planned.reduce_at, fuse=planned.fuse)
        config.keep.update(tokens=planned.tokens, rates=(), macs=0.0)
        config.reducer.r = 0
    after = workdirs.flat(config.to_dict())
    for key in dict.fromkeys(name.partition('[')[0] for name in explicit):
        if key == 'keep.rate' or before.get(key) != after.get(key):
            raise ValueError(f'give only one of --plan={planned.path} and --config.{key}={before[key]}: the plan in '
                             'the file decides which tokens stay')
    return config


def train_batches(run: Experiment, start_step: int) -> pipeline.Batches:
    """The training batches from a step on; call `close()` on them."""
    config = run.config
    return pipeline.train_batches(
        run.train_source, batch_size=config.batch_size, epochs=config.epochs, seed=config.seed,
        transform=inputs.train_transform(config), repeats=config.data.repeats, targets=run.targets,
        start_step=start_step, offset=run.offset, num_workers=machine.resolve_workers(config.data.workers),
        process_index=jax.process_index(), process_count=jax.process_count())


def held_out_batches(run: Experiment) -> pipeline.Batches:
    """The test split once; call `close()` on it."""
    return pipeline.eval_batches(
        run.test_source, batch_size=run.config.batch_size, transform=inputs.eval_transform(run.config),
        num_workers=machine.resolve_workers(run.config.data.workers), process_index=jax.process_index(),
        process_count=jax.process_count())


def failures(run: Experiment, source: Source) -> Failures:
    """Counts what cannot be read of a source."""
    return Failures(run.config.data.max_failed, len(source))


def keep_rate(run: Experiment, stage: Stage) -> float:
    """The rate of a stage, for the log; with several rates that of the first reduction, with token counts its share.

    Where r tokens are merged in every block, or the MACs decide, what the first reduction keeps.
    """
    keep, plan = run.config.keep, stage.plan
    if run.config.reducer.r or keep.macs:
        return plan.keep[plan.reductions[0]] / run.patches if plan.reductions else 1.0
    at, rate = run.config.model.reduce_at, keep.rate
    if keep.tokens:
        rate = by_depth(at, keep.tokens, 'tokens')[0] / run.patches
    elif keep.rates:
        rate = by_depth(at, keep.rates, 'rates')[0]
    return 1 - (1 - rate) * stage.progress


def _open_sources(config):
    train, test = inputs.open_sources(config)
    counts = [f'{len(source):,} examples to {use} on (split {split_of(source, asked)})' for source, use, asked in (
        (train, 'train', config.data.train_split), (test, 'evaluate', config.data.test_split))]
    logging.info('data: %s, %s, %d classes', *counts, train.num_classes)
    return train, test


def _steps_per_epoch(config, train_source):
    return order.epoch_samples(len(train_source), config.data.repeats) / config.batch_size


def config_and_plans(config: Any, trained: dict[str, Any] | None = None) -> tuple[
        ViTConfig, Callable[[float], TokenPlan], Modules]:
    """Returns the model's config, its plans by the progress of the keep schedule in [0, 1], and its learned modules.

    Args:
      trained: see `setup`.

    Raises:
      ValueError: a value that cannot work.
    """
    flat = workdirs.flat(config.to_dict())
    trained = trained or flat
    model_config = models.config_from_flat(flat | {'model.image_size': trained['model.image_size']})
    budget = TokenBudget.of_config(flat)
    plan_at = budget.plans(model_config.patches(config.model.image_size), model_config.depth, model_config.macs)
    modules = trained_modules(trained)
    modules.check(plan_at(1.0))
    check_trained_blocks(plan_at(1.0), trained.get('model.reduce_at', ()))
    return model_config, plan_at, modules


def trained_modules(flat: dict[str, Any]) -> Modules:
    """Returns the learned modules of a model that is trained with a flat config: one per reduction, if any."""
    reducer = registry.get_reducer(flat.get('reducer.name', 'evit'))
    return Modules(reducer, len(flat['model.reduce_at'])) if reducer.is_learned else NO_MODULES
