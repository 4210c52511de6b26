"""What was trained, with everything that is needed to use it."""

import dataclasses
import os
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import jax

from evit_jax import models
from evit_jax.checkpoints import open_defaults
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import read_newest
from evit_jax.checkpoints.weights import AS_DEIT, check_finite, check_is_workdir, fitted
from evit_jax.configs.base import absent
from evit_jax.data.classes import default_class_names, readable_names
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.budget import TokenBudget, check_trained_blocks
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import NO_MODULES, Modules, Reducer, modules_of
from evit_jax.runtime import machine, storage

_UNSAID = AS_DEIT | absent('model.dtype')


class LoadedModel(NamedTuple):
    """Weights, and how an image comes to them; `_replace(image_size=...)` makes ready for larger images."""

    path: str
    name: str                     # of the model
    step: int
    params: Params                # numpy arrays
    config: ViTConfig
    class_names: tuple[str, ...]  # by label
    image_size: int
    mean: tuple[float, ...]       # of the channels, of values in 0..1
    std: tuple[float, ...]
    eval_crop: float | None       # see `EvalTransform`
    dtype: str                    # of the computation
    budget: TokenBudget           # as trained
    modules: Modules = NO_MODULES  # the learned modules of the reducer that it was trained with

    def with_reducer(self, name: str | Reducer | None) -> 'LoadedModel':
        """The same weights with the tokens reduced by another method; None: as trained.

        Raises:
          ValueError: there is no method of this name.
        """
        if name is None:
            return self
        reducer, budget = registry.get_reducer(name), self.budget
        return self._replace(budget=budget._replace(reducer=reducer, r=budget.r if reducer.merges else 0))

    def folded(self) -> 'LoadedModel':
        """The same model as it is served, without batch normalisation: see `models.fold_batchnorm`."""
        config, params = models.fold_batchnorm(self.config, self.params)
        return self._replace(config=config, params=params)

    def plan(self, *, rate: float | None = None, rates: Sequence[float] = (), tokens: Sequence[int] = (),
             r: int | None = None, planned: PlanFile | None = None) -> TokenPlan:
        """The plan of one rate, of a rate or a token count for each reduction, or of r tokens merged in every block.

        Or one that the planner has made. Of none of these, as trained.

        Raises:
          ValueError: more than one of them, a value out of range, a plan for another model, or one that asks predictors
            that are not there.
        """
        for name, values in (('rates', rates), ('tokens', tokens)):
            if isinstance(values, str | Set | Mapping) or not hasattr(values, '__len__'):
                raise ValueError(f'{name}={values!r} is no sequence: give a number for each reduction, as '
                                 f'{name}={"(0.9, 0.7)" if name == "rates" else "(137, 96)"}')
        asked = {'rate': rate is not None, 'rates': len(rates) > 0, 'tokens': len(tokens) > 0, 'r': r is not None,
                 'plan': planned is not None}
        given = [name for name, said in asked.items() if said]
        if len(given) > 1:
            raise ValueError(f'give only one of {" and ".join(given)}')
        budget, patches = self.budget, self.config.patches(self.image_size)
        if planned is not None:
            planned.check(self.name, patches, self.config.depth)
            budget = budget.apply_plan(planned)
        elif given and r is None and not budget.reduce_at:
            raise ValueError(f'the model in {self.path} drops nothing at any block (model.reduce_at is empty): make a '
                             f'plan with blocks of your own, or leave {given[0]} out')
        if rate is not None:
            budget = budget.at(rate)
        elif given and planned is None:
            dense = budget.at(1.0)
            budget = dense._replace(rates=tuple(rates) or dense.rates, tokens=tuple(tokens), r=r or 0)
        plan = budget.plans(patches, self.config.depth, self.config.macs)(1.0)
        self.modules.check(plan)
        check_trained_blocks(plan, self.budget.reduce_at)
        return plan


def load_model(path: str | os.PathLike, *, ema: bool = False) -> LoadedModel:
    """Reads weights from the newest checkpoint of a run, from its `best`, or from a folder of weights alone.

    Args:
      path: of the folder; may be in a bucket, gs://bucket/run.
      ema: the moving average of the weights.

    Raises:
      ValueError: no readable checkpoint, one of another model, no average in it, or weights that are not finite.
    """
    _check_place(path)
    weights, metadata = read_newest(path, 'ema' if ema else 'params')
    if not weights:
        raise ValueError(f'{path} holds no moving average: take its weights')
    check_finite(weights, path)
    told = _UNSAID | workdirs.flat(metadata.get('config', {}))
    if 'model.name' not in told:
        raise ValueError(f'the checkpoint in {path} does not say of which model it is (model.name of its config)')
    name = told['model.name']
    config = dataclasses.replace(models.config_from_flat(told), classes=weights['head.bias'].size)
    budget = TokenBudget.of_config(told)
    modules = modules_of(budget.reducer, weights)
    like = jax.eval_shape(models.create(config, modules=modules).init, jax.random.key(0))
    names = metadata.get('class_names') or default_class_names(config.classes)
    if len(names) != config.classes:
        raise ValueError(f'the checkpoint in {path} names {len(names)} classes, its model tells {config.classes} apart')
    return LoadedModel(
        os.fspath(path), name, metadata['next_step'], fitted(weights, like, path), config,
        readable_names(names), config.image_size, *open_defaults.normalisation(told), told['data.eval_crop'] or None,
        machine.resolve_dtype(told['model.dtype'], jax.default_backend()), budget, modules)


def _check_place(path):
    """Raises a ValueError where no folder is; of a bucket `read_newest` knows more."""
    if storage.is_remote(path):
        return
    place = storage.as_path(path)
    check_is_workdir('the path of the weights', path)
    if not place.is_dir():
        raise ValueError(f'there is no folder {path}: give the folder of a run')
