"""The objects of a run: model, data, token plans, optimizer and steps, built from its config."""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
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
from evit_jax.models.config import ViTConfig, as_hw
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.schedule import KeepSchedule, Stage, stages
from evit_jax.runtime import agreement, machine, sharding
from evit_jax.training import distillation, inputs, model_setup, objective_config
from evit_jax.training import optimizer as optimizers
from evit_jax.training import step as steps
from evit_jax.training.distillation import Teacher
from evit_jax.training.objectives import Targets


class Experiment(NamedTuple):
    """The objects that training and evaluation need. `setup` creates them."""

    config: Any                    # the only ml_collections config; other modules get `flat_config`
    mesh: Mesh
    model: Model
    train_source: Source
    test_source: Source
    plan: TokenPlan                # plan at the keep rate of the config; used in evaluation
    stages: tuple[Stage, ...]
    total_steps: int
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    prepare: Callable
    targets: TokenTargets | None   # token labels of the training images
    offset: int = 0                # step s starts at sample s * batch_size + offset; see `positions`

    @property
    def flat_config(self) -> dict[str, Any]:
        """The config with dotted keys."""
        return workdirs.flat(self.config)

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.plan.patches

    @property
    def steps_per_epoch(self) -> float:
        return _steps_per_epoch(self.config, self.train_source)

    def epoch(self, step: int) -> float:
        """Returns the number of epochs completed before a step."""
        return (step + self.offset / self.config.batch_size) / self.steps_per_epoch

    def with_offset(self, offset: int) -> 'Experiment':
        """Returns the same run with another offset: step s starts at sample s * batch_size + offset."""
        return self if offset == self.offset else setup(
            self.config, mesh=self.mesh, sources=(self.train_source, self.test_source), offset=offset,
            model_config=self.model.config)

    @property
    def metadata(self) -> dict[str, Any]:
        """JSON metadata that is stored with each checkpoint."""
        return {'config': self.config.to_dict(), 'class_names': list(self.train_source.class_names),
                model_configs.KEY: model_configs.to_json(self.model.config)}

    def new_state(self) -> TrainState:
        """Returns the state before the first step, on all devices.

        The weights are read from `config.init_from`, or random if this key is empty.

        Raises:
          ValueError: the weights in `init_from` cannot be read or do not match the model.
        """
        config, replicated = self.config, sharding.replicated(self.mesh)
        params = jax.jit(self.model.init, out_shardings=replicated)(jax.random.key(config.seed))
        if config.init_from:
            weights.check_values(config.init_from, self.model.config)
            params = weights.same_weights(config.init_from, functools.partial(
                weights.start_from, config.init_from, params, config=self.model.config,
                ema=config.init_ema, class_names=self.train_source.class_names))
        return jax.jit(self._state_of, out_shardings=self.shardings())(params)

    def trained_state(self, workdir: str | os.PathLike) -> TrainState:
        """Returns the newest checkpoint of a run on all devices, without the optimizer's state.

        Raises:
          ValueError: there is no readable checkpoint, or its weights do not match the model.
        """
        params, ema, step = weights.same_weights(
            workdir, functools.partial(weights.read, workdir, self._shapes().params))
        put = jax.jit(lambda tree: tree, out_shardings=self.shardings().params)
        return TrainState(jnp.int32(step), put(params), None if ema is None else put(ema), ())

    def abstract_state(self) -> TrainState:
        """Returns the shapes, dtypes and shardings of the state."""
        return jax.tree.map(lambda leaf, leaf_sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                                             sharding=leaf_sharding),
                            self._shapes(), self.shardings())

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and sharding of a training batch."""
        batch, size = self.config.batch_size, as_hw(models.image_size_of(self.flat_config))
        arrays = {'image': ((batch, *size, 3), np.uint8), 'label': ((batch,), np.int32)}
        if self.targets:
            arrays |= {name: ((batch, *row), dtype) for name, (row, dtype) in self.targets.shapes.items()}
        batch_sharding = sharding.batch_sharding(self.mesh)
        return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding)
                for name, (shape, dtype) in arrays.items()}

    def shardings(self) -> TrainState:
        """Returns the sharding of each array of the state."""
        return sharding.state_shardings(self._shapes(), self.mesh, self.config.sharding)

    def read_teacher(self) -> Teacher | None:
        """Loads the teacher and transfers its parameters to all devices. Returns None if the config has no teacher.

        Raises:
          ValueError: the teacher cannot be read, or does not match this run.
        """
        config = self.config
        read = functools.partial(distillation.read_teacher, self.flat_config, self.plan, self.model.config.width,
                                 self.train_source.class_names, machine.DTYPES[config.model.dtype])
        teacher = weights.same_weights(config.teacher.path or config.init_from, read,
                                       lambda teacher: teacher and teacher.arrays)
        if teacher is None:
            return None
        teacher = teacher._replace(digest=agreement.digest_tree(teacher.arrays))
        shardings = sharding.state_shardings(teacher.params, self.mesh, config.sharding)
        return teacher._replace(model=steps.with_whole_params(teacher.model, self.mesh),
                                params=jax.jit(lambda tree: tree, out_shardings=shardings)(teacher.params))

    def train_step(self, teacher: Teacher | None = None) -> Callable:
        """Returns the jitted training step. If there is a teacher, its parameters are the last argument of the step.

        Raises:
          ValueError: the config needs a teacher, but none is given.
        """
        config, model = self.config, steps.with_whole_params(self.model, self.mesh)
        if teacher is None and config.distill.kind != 'none':
            raise ValueError(f'config.distill.kind={config.distill.kind} needs a teacher, and there is none here: give '
                             '--config.distill.kind=none')
        teach = teacher and functools.partial(teacher.teach, mean=tuple(config.data.mean), std=tuple(config.data.std))
        rule = steps.UpdateRule(self.optimizer, self.schedule, config.ema_decay, config.optimizer.accumulate,
                                skip_nonfinite=config.nonfinite == 'skip', freeze=config.model.freeze)
        step = steps.make_train_step(
            model, rule, prepare=self.prepare, mix=self._mix, teach=teach, seed=config.seed,
            objective=functools.partial(objective_config.objective, self.flat_config))
        state, replicated = self.shardings(), sharding.replicated(self.mesh)
        batch = sharding.batch_sharding(self.mesh)
        teacher_params = [jax.tree.map(lambda leaf: leaf.sharding, teacher.params)] if teacher else []
        return jax.jit(sharding.with_mesh(self.mesh, step), static_argnums=2,
                       in_shardings=(state, batch, *teacher_params), out_shardings=(state, replicated),
                       donate_argnums=0)

    def eval_step(self) -> Callable:
        """Returns the jitted evaluation step. Equal runs share it, so that it is compiled once."""
        data = self.config.data
        return steps.jit_eval_step(self.model, self.mesh, self.config.sharding, tuple(data.mean), tuple(data.std))

    def train_batches(self, start_step: int) -> pipeline.Batches:
        """Returns the training batches, starting at a step. Call `close()` on them."""
        config = self.config
        sample_order = order.SampleOrder(
            config.batch_size, config.epochs, config.seed, config.data.repeats, self.offset)
        return pipeline.train_batches(
            self.train_source, sample_order, inputs.train_transform(self.flat_config), targets=self.targets,
            start_step=start_step, num_workers=machine.resolve_workers(config.data.workers),
            process_index=jax.process_index(), process_count=jax.process_count())

    def eval_batches(self) -> pipeline.Batches:
        """Returns one pass over the test split. Call `close()` on it."""
        config = self.config
        return pipeline.eval_batches(
            self.test_source, batch_size=config.batch_size, transform=inputs.eval_transform(self.flat_config),
            num_workers=machine.resolve_workers(config.data.workers), process_index=jax.process_index(),
            process_count=jax.process_count())

    def failures(self, source: Source) -> Failures:
        """Returns a new counter of unreadable examples of a source."""
        return Failures(self.config.data.max_failed, len(source))

    def _mix(self, images, batch, key):
        if self.targets:
            erase_key, swap_key = jax.random.split(key)
            if self.config.mixing.erase:
                images = mixing.random_erasing(images, erase_key, self.config.mixing.erase)
            label, tokens, swap = mixtoken.mix_batch(
                batch, swap_key, grid=self.targets.grid, classes=self.model.config.classes, groups=self.mesh.size,
                smoothing=self.config.label_smoothing)
            return steps.Mixed(images, Targets(label, tokens), {'swap': swap})
        images, targets = mixing.mix_batch(images, batch['label'], key, groups=self.mesh.size,
                                           mixing=inputs.mixing_settings(self.flat_config),
                                           classes=self.model.config.classes)
        return steps.Mixed(images, Targets(targets))

    def _state_of(self, params):
        return create_state(params, self.optimizer, ema=self.config.ema_decay > 0, freeze=self.config.model.freeze)

    def _shapes(self):
        return _state_shapes(self.model.init, self.optimizer, self.config.ema_decay > 0, self.config.model.freeze)


@functools.lru_cache(maxsize=4)  # a run needs its shapes at many points
def _state_shapes(init, optimizer, ema, freeze):
    params = jax.eval_shape(init, jax.random.key(0))
    return jax.eval_shape(functools.partial(create_state, optimizer=optimizer, ema=ema, freeze=freeze), params)


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns a copy of a config with new values for some dotted keys. Lists become tuples."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict({key: tuple(value) if isinstance(value, list) else value
                                           for key, value in values.items()})
    return config


def setup(config: Any, *, trained: dict[str, Any] | None = None, mesh: Mesh | None = None,
          sources: tuple[Source, Source] | None = None, offset: int = 0,
          model_config: ViTConfig | None = None) -> Experiment:
    """Creates the objects of a run from its config.

    Args:
      trained: flat config with which the model was trained, if it is not `config`; see `config_and_plans`.
      mesh: devices of the run; by default all devices.
      sources: training and test source; default: those in the config.
      offset: step s starts at sample s * batch_size + offset.
      model_config: model config to use instead of the named model's. Values set in `config.model` override it.

    Raises:
      ValueError: a value is out of range. The message gives the value, its limit and a solution.
    """
    mesh = mesh or sharding.data_mesh(config.batch_size)
    platform = mesh.devices.flat[0].platform
    config = with_values(config, open_defaults.resolve(workdirs.flat(config), platform=platform))
    train_source, test_source = (inputs.check_classes(sources, config.model.classes) if sources else
                                 _open_sources(config))
    if not config.model.classes:
        config = with_values(config, {'model.classes': train_source.num_classes})
    flat_config = workdirs.flat(config)
    model_config, plan_at, modules = model_setup.config_and_plans(flat_config, trained, model_config)
    batch_size, per_epoch = config.batch_size, _steps_per_epoch(config, train_source)
    steps_without_offset, total_steps = (
        order.train_steps(len(train_source), batch_size, config.epochs, config.data.repeats, samples)
        for samples in (0, offset))
    keep = KeepSchedule(round(config.keep.start_epoch * per_epoch), round(config.keep.shrink_epochs * per_epoch),
                        config.keep.levels)
    run_stages = stages(keep, lambda progress: plan_at(progress).in_training(), steps_without_offset)
    run_stages = tuple(stage._replace(start=max(-((offset - stage.start * batch_size) // batch_size), 0))
                       for stage in run_stages)
    optimizer, schedule = optimizers.from_config(flat_config, total_steps=steps_without_offset,
                                                 steps_per_epoch=per_epoch, begun_at=offset / batch_size)
    model = models.create(model_config, drop_path=config.model.drop_path, dtype=machine.DTYPES[config.model.dtype],
                          remat=config.remat, gather_impl=config.model.gather_impl, modules=modules)
    prepare = functools.partial(steps.normalise, mean=tuple(config.data.mean), std=tuple(config.data.std))
    targets = inputs.token_targets(config.data.token_labels, train_source,
                                   model_config.grid(models.image_size_of(flat_config)))
    return Experiment(config, mesh, model, train_source, test_source, plan_at(1.0), run_stages, max(total_steps, 0),
                      optimizer, schedule, prepare, targets, offset)


def _open_sources(config):
    train, test = inputs.open_sources(workdirs.flat(config))
    counts = [f'{len(source):,} examples to {use} on (split {split_of(source, split)})' for source, use, split in (
        (train, 'train', config.data.train_split), (test, 'evaluate', config.data.test_split))]
    logging.info('data: %s, %s, %d classes', *counts, train.num_classes)
    return train, test


def _steps_per_epoch(config, train_source):
    return order.epoch_samples(len(train_source), config.data.repeats) / config.batch_size
