"""Computes model config and token plans from the flat config of a run, and the config keys of a plan or a model."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import model_digest
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_checks import by_depth
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import Modules, modules_at
from evit_jax.reduction.schedule import Stage

CUSTOM = 'custom'  # model.name of a model that was passed as an object
INIT_FROM = 'init_from'  # model.name for the model of the initial weights; see `initial_model`


def config_and_plans(config: Mapping[str, Any], trained: Mapping[str, Any] | None = None,
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
    trained = trained or config
    sizes = {key: trained.get(key) for key in ('model.image_size', 'model.image_width')}
    model_config = models.config_from_flat({**config, **sizes}, base)
    budget = TokenBudget.of_config(config)
    plan_at = budget.plans(model_config.patches(models.image_size_of(config)), model_config.depth, model_config.macs)
    modules = trained_modules(trained, model_config)
    _check_schedule(config, modules)
    modules.check(plan_at(1.0))
    model_config.check_reducer(plan_at(1.0))
    return model_config, plan_at, modules


def trained_modules(config: Mapping[str, Any], model_config: ViTConfig) -> Modules:
    """Returns the learned modules of a model that is trained with a flat config."""
    reducer = registry.get_reducer(config.get('reducer.name', 'evit'))
    if not reducer.has_sized_modules:
        return modules_at(reducer, config['model.reduce_at'])
    patches = model_config.patches(models.image_size_of(config))
    return TokenBudget.of_config(config).modules(patches, model_config.depth, model_config.macs)


def _check_schedule(config, modules):
    if modules.tokens and config['keep.shrink_epochs']:
        raise ValueError(
            f'config.keep.shrink_epochs={config["keep.shrink_epochs"]:g} changes the kept tokens during training, '
            f'and reducer {modules.reducer} has learned parameters for each of them: give '
            '--config.keep.shrink_epochs=0 --config.keep.start_epoch=0')


def values_of_model(model_config: ViTConfig, name: str) -> dict[str, Any]:
    """Returns the config values of a model config, by dotted key.

    Args:
      name: name of the model in the config. It becomes 'custom' if the model config differs from that of the named
        model.
    """
    fields = {key: getattr(model_config, key) for key in model_configs.CONFIG_FIELDS}
    named = models.CONFIGS.get(name)
    differs = named is not None and dataclasses.replace(named, **fields) != model_config
    fields |= models.image_size_keys(model_config.image_size)
    return {'model.name': CUSTOM if differs or name == INIT_FROM else name} | {
        f'model.{key}': value for key, value in fields.items()}


def values_of_plan(plan_file: PlanFile, config: Mapping[str, Any], explicit: Collection[str] = (), *,
                   base: ViTConfig | None = None) -> dict[str, Any]:
    """Returns the config values that a plan file replaces, by dotted key: blocks, token counts, fusion and reducer.

    A file without a reducer leaves the reducer of the config unchanged.

    Args:
      config: flat config of the run.
      explicit: keys set on the command line.
      base: model config to use instead of the named model's.

    Raises:
      ValueError: the plan is for another model, or an explicit key contradicts it.
    """
    name = config['model.name']
    model_config = base or models.config_from_flat(config)
    plan_file = plan_file.for_model(name, model_config.patches(models.image_size_of(config)), model_config.depth,
                                    model_digest.digest_of_architecture(model_config))
    values = {'model.reduce_at': [*plan_file.reduce_at], 'model.fuse': plan_file.fuse,
              'keep.tokens': [*plan_file.tokens], 'keep.drop': [*plan_file.drop], 'keep.rates': [], 'keep.macs': 0.0,
              'reducer.r': 0} | ({'reducer.name': plan_file.reducer} if plan_file.reducer else {})
    explicit = dict.fromkeys(name.partition('[')[0] for name in explicit)
    if 'reducer.name' in explicit:
        plan_file.check_reducer(config['reducer.name'])
    for key in explicit:
        if key == 'keep.rate' or (key in values and values[key] != config[key]):
            raise ValueError(f'give only one of --plan={plan_file.path} and --config.{key}={config[key]}: the plan in '
                             'the file decides which tokens are kept')
    return values


def logged_keep_rate(config: Mapping[str, Any], stage: Stage) -> float:
    """Returns the keep rate of a stage for the log: the fraction of tokens kept by the first reduction.

    If `keep.tokens` is set, it is the fraction of all patches. If `reducer.r` or `keep.macs` is set, it is taken from
    the plan.
    """
    plan = stage.plan
    if config['reducer.r'] or config['keep.macs']:
        return plan.keep[plan.reductions[0]] / plan.patches if plan.reductions else 1.0
    blocks, rate = config['model.reduce_at'], config['keep.rate']
    if config['keep.tokens']:
        rate = by_depth(blocks, config['keep.tokens'], 'tokens')[0] / plan.patches
    elif config['keep.rates']:
        rate = by_depth(blocks, config['keep.rates'], 'rates')[0]
    return 1 - (1 - rate) * stage.progress
