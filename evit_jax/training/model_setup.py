"""Computes model config and token plans from the config of a run, and writes a plan or a model to a config."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan, by_depth
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import Modules, modules_at
from evit_jax.reduction.schedule import Stage

CUSTOM = 'custom'  # model.name and data.source if model and sources are passed as objects
INIT_FROM = 'init_from'  # model.name for the model of the initial weights; see `initial_model`


def config_and_plans(config: Any, trained: dict[str, Any] | None = None,
                     base: ViTConfig | None = None) -> tuple[ViTConfig, Callable[[float], TokenPlan], Modules]:
    """Returns the model config of a run, a function from progress to token plan, and the learned modules.

    Progress is the progress of the keep schedule, in [0, 1]: 0 gives the dense plan, 1 the plan used in evaluation.

    Args:
      trained: flat config with which the weights were trained, if it is not `config`. It determines the size of the
        position embeddings and the learned modules.
      base: model config to use instead of the named model's.

    Raises:
      ValueError: a value is out of range, or values contradict each other.
    """
    flat = workdirs.flat(config.to_dict())
    trained = trained or flat
    sizes = {key: trained.get(key) for key in ('model.image_size', 'model.image_width')}
    model_config = models.config_from_flat(flat | sizes, base)
    budget = TokenBudget.of_config(flat)
    plan_at = budget.plans(model_config.patches(models.image_size_of(flat)), model_config.depth, model_config.macs)
    modules = trained_modules(trained)
    modules.check(plan_at(1.0))
    return model_config, plan_at, modules


def trained_modules(flat: dict[str, Any]) -> Modules:
    """Returns the learned modules of a model that is trained with a flat config."""
    return modules_at(registry.get_reducer(flat.get('reducer.name', 'evit')), flat['model.reduce_at'])


def apply_model_config(config: Any, model_config: ViTConfig) -> Any:
    """Returns the config with `config.model` taken from a model config.

    The name of the model becomes 'custom' if the model config differs from that of the named model.
    """
    values = {key: getattr(model_config, key) for key in model_configs.CONFIG_FIELDS}
    named = models.CONFIGS.get(config.model.name)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(values | models.image_size_keys(model_config.image_size))
        differs = named is not None and dataclasses.replace(named, **values) != model_config
        if differs or config.model.name == INIT_FROM:
            config.model.name = CUSTOM
    return config


def apply_plan(config: Any, plan_file: PlanFile, explicit: Collection[str] = (), *,
               base: ViTConfig | None = None) -> Any:
    """Returns the config with the reducing blocks, token counts and fusion of a plan file.

    Args:
      explicit: keys set on the command line.
      base: model config to use instead of the named model's.

    Raises:
      ValueError: the plan is for another model, or an explicit key contradicts it.
    """
    before = workdirs.flat(config.to_dict())
    model_config = base or models.get_config(config.model.name)
    plan_file.check(config.model.name, model_config.patches(models.image_size_of(before)), model_config.depth)
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model.update(reduce_at=plan_file.reduce_at, fuse=plan_file.fuse)
        config.keep.update(tokens=plan_file.tokens, rates=(), macs=0.0)
        config.reducer.r = 0
    after = workdirs.flat(config.to_dict())
    for key in dict.fromkeys(name.partition('[')[0] for name in explicit):
        if key == 'keep.rate' or before.get(key) != after.get(key):
            raise ValueError(f'give only one of --plan={plan_file.path} and --config.{key}={before[key]}: the plan in '
                             'the file decides which tokens are kept')
    return config


def logged_keep_rate(config: Any, stage: Stage) -> float:
    """Returns the keep rate of a stage for the log: the fraction of tokens kept by the first reduction.

    If `keep.tokens` is set, it is the fraction of all patches. If `reducer.r` or `keep.macs` is set, it is taken from
    the plan.
    """
    keep, plan = config.keep, stage.plan
    if config.reducer.r or keep.macs:
        return plan.keep[plan.reductions[0]] / plan.patches if plan.reductions else 1.0
    blocks, rate = config.model.reduce_at, keep.rate
    if keep.tokens:
        rate = by_depth(blocks, keep.tokens, 'tokens')[0] / plan.patches
    elif keep.rates:
        rate = by_depth(blocks, keep.rates, 'rates')[0]
    return 1 - (1 - rate) * stage.progress
