"""Trained weights together with the settings needed to run them."""

import dataclasses
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from evit_jax import models
from evit_jax.checkpoints import model_config as model_configs
from evit_jax.checkpoints import model_digest, open_defaults, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.manager import read_newest
from evit_jax.configs.base import absent
from evit_jax.data.classes import default_class_names, readable_names
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.models import Params
from evit_jax.models.config import ImageSize, ViTConfig
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan, merge_plan
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.reduction.reducer import NO_MODULES, PARAMS, Modules, Reducer, modules_of
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import machine, storage

CUSTOM = 'custom'  # name of every model that is not in `models.CONFIGS`
_BUDGET_DEFAULTS = absent('reducer.name', 'reducer.r', 'reducer.decreasing', 'keep.rates', 'keep.tokens', 'keep.drop',
                          'keep.macs')
_DEFAULTS = weights.AS_DEIT | absent('model.dtype')


class LoadedModel(NamedTuple):
    """The weights of a model, its preprocessing and its token budget.

    `_replace(image_size=...)` returns a model for another image size; position embeddings are resized when it runs.
    """

    path: str                     # folder or file of the weights; '' for a model created in memory
    name: str                     # key of `models.CONFIGS`, or 'custom'
    step: int                     # number of completed training steps
    params: Params                # numpy arrays, float32
    config: ViTConfig
    class_names: tuple[str, ...]  # name of each class, in the order of the labels
    image_size: ImageSize         # input of the model: side of a square, or (height, width), in pixels
    mean: tuple[float, ...]       # mean of each channel, for values in 0..1
    std: tuple[float, ...]        # standard deviation of each channel
    eval_crop: float | None       # see `EvalTransform`
    dtype: str                    # compute dtype: 'float32' or 'bfloat16'
    budget: TokenBudget           # the budget used in training, unless replaced
    modules: Modules = NO_MODULES  # learned modules of the reducer used in training
    interpolation: str = 'bicubic'  # see `EvalTransform`
    base_model: str = ''          # name of the pretrained model that the training started from; '' if unknown
    reducer_is_explicit: bool = False  # True after `with_reducer`: a plan file must not name another reducer

    def check_has_classes(self) -> None:
        """Raises a ValueError if the model returns features instead of logits of classes."""
        model_configs.check_has_classes(self.config, self.path or self.name)

    def with_reducer(self, reducer: str | Reducer | None) -> 'LoadedModel':
        """Returns the same weights with another reducer.

        Args:
          reducer: a registered name, or a reducer; None: no change.

        Raises:
          ValueError: no reducer is registered under the name.
        """
        if reducer is None:
            return self
        reducer = get_reducer(reducer)
        return self._replace(reducer_is_explicit=True, budget=self.budget._replace(
            reducer=reducer, r=self.budget.r if reducer.merges else 0))

    def eval_transform(self) -> EvalTransform:
        """Returns the transform of images for evaluation and prediction."""
        return EvalTransform(self.image_size, crop=self.eval_crop, interpolation=self.interpolation)

    def needs_modules(self) -> bool:
        """True if the reducer has learned modules that the weights lack."""
        reducer = self.budget.reducer
        return reducer.is_learned and (not self.modules.count or self.modules.reducer != reducer)

    def with_random_modules(self, seed: int = 0) -> 'LoadedModel':
        """Adds random learned modules of the reducer, one for each reducing block. They must be trained before use.

        Args:
          seed: seed of the random weights.
        """
        modules = self.budget.modules(self.config.patches(self.image_size), self.config.depth, self.config.macs)
        fresh = models.create(self.config, modules=modules).init(jax.random.key(seed))
        params = self.params | {PARAMS: jax.device_get(fresh[PARAMS])}
        return self._replace(params=params, modules=modules)

    def with_plan(self, *, keep_rate: float | None = None, keep_rates: Sequence[float] = (),
                  tokens: Sequence[int] = (), r: int | Sequence[int] | None = None, macs: float | None = None,
                  plan: TokenPlan | PlanFile | str | os.PathLike | None = None) -> 'LoadedModel':
        """Returns the same weights with another token budget. Give at most one argument; without one, nothing changes.

        Args: see `VisionModel.with_plan`.

        Raises:
          ValueError: more than one argument is given, or the plan is for another model or reducer.
        """
        requested = _requested(keep_rate, keep_rates, tokens, r, macs, plan)
        budget = self.budget
        if requested and requested[0] in ('keep rate', 'keep rates', 'tokens') and not budget.reduce_at:
            raise ValueError(f'the model {self.path or self.name} drops nothing at any block (model.reduce_at is '
                             f'empty): give a plan with blocks of your own, or leave {requested[0]} out')
        if hasattr(r, '__len__'):  # the budget has only one r: store the counts
            plan = merge_plan(self.config.patches(self.image_size), self.config.depth, r=tuple(r),
                              reducer=budget.reducer)
        if plan is not None:
            return self._replace(budget=self._budget_of(plan))
        if keep_rate is not None:
            return self._replace(budget=budget.at(keep_rate))
        if requested:
            dense = budget.at(1.0)
            budget = dense._replace(rates=tuple(keep_rates) or dense.rates, tokens=tuple(tokens), r=r or 0,
                                    macs=macs or 0.0)
        return self._replace(budget=budget)

    def plan(self, **budget: Any) -> TokenPlan:
        """Returns the token plan of the budget, or of another budget; the arguments are those of `with_plan`.

        Raises:
          ValueError: a value is out of range, the plan is for another model, or the reducer needs learned parameters
            or an attention pool that the model lacks.
        """
        given = budget.get('plan')
        model = self.with_plan(**budget)
        plan = given if isinstance(given, TokenPlan) else model.budget.plans(
            self.config.patches(self.image_size), self.config.depth, self.config.macs)(1.0)
        self.modules.check(plan)
        self.config.check_reducer(plan)
        return plan

    def fold_batchnorm(self) -> 'LoadedModel':
        """Returns the model with folded batch normalisation, for inference; see `models.fold_batchnorm`."""
        config, params = models.fold_batchnorm(self.config, self.params)
        return self._replace(config=config, params=params)

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata argument for `weights.save`."""
        config, budget = self.config, self.budget
        options = {key: getattr(config, key) for key in ('classes', 'distilled', *models.NOT_IN_SHAPES)}
        rates = {'rate': budget.rates[0] if budget.rates else 1.0, 'rates': budget.rates}
        modules = {'reducer': self.modules.reducer.name, 'blocks': self.modules.blocks,
                   'tokens': self.modules.tokens} if self.modules.count else None
        return ({'modules': modules} if modules else {}) | {
            'class_names': list(self.class_names), model_configs.KEY: model_configs.to_json(config),
            'config': {
                'base_model': self.base_model,
                'model': {'name': self.name, 'dtype': self.dtype, 'reduce_at': budget.reduce_at, 'fuse': budget.fuse,
                          **models.image_size_keys(self.image_size)} | options,
                'reducer': {'name': budget.reducer.name, 'r': budget.r, 'decreasing': budget.decreasing},
                'keep': rates | {'tokens': budget.tokens, 'drop': budget.drop, 'macs': budget.macs},
                'data': {'mean': self.mean, 'std': self.std, 'eval_crop': self.eval_crop or 0.0,
                         'interpolation': self.interpolation}}}

    def _budget_of(self, plan):
        """Returns the budget of a plan. The plan must be for this model."""
        patches, depth = self.config.patches(self.image_size), self.config.depth
        if isinstance(plan, TokenPlan):
            if (plan.patches, len(plan.keep)) != (patches, depth):
                raise ValueError(f'the plan is for {plan.patches} patches and {len(plan.keep)} blocks, the model has '
                                 f'{patches} patches and {depth} blocks')
            return self.budget.at(1.0)._replace(
                reducer=plan.reducer, reduce_at=plan.reductions, fuse=plan.fused, rates=(1.0,) * len(plan.reductions),
                tokens=plan.tokens, drop=plan.dropped)
        plan = plan if isinstance(plan, PlanFile) else read_plan_file(plan)
        plan = plan.for_model(self.name, patches, depth, model_digest.digest_of_architecture(self.config))
        if self.reducer_is_explicit:
            plan.check_reducer(self.budget.reducer)
        if plan.weights:  # a digest reads the weights: compute it only if the file has one
            plan.warn_of_other_weights(model_digest.digest_of_weights(self.params))
        return self.budget.apply_plan(plan)


def load_model(path: str | os.PathLike, *, ema: bool = False) -> LoadedModel:
    """Loads the newest checkpoint of a run, of its folder `best`, or of a folder of weights.

    Args:
      path: the folder, local or in a bucket (gs://bucket/run).
      ema: load the EMA of the weights.

    Raises:
      ValueError: there is no readable checkpoint, it has no EMA, or weights are not finite.
    """
    _check_path(path)
    arrays, metadata = read_newest(path, 'ema' if ema else 'params')
    if not arrays:
        raise ValueError(f'{path} holds no moving average: load its weights instead')
    weights.check_finite(arrays, path)
    return from_arrays(path, arrays, metadata)


def saved_budget(config: Mapping[str, Any]) -> TokenBudget:
    """Returns the token budget of a saved flat config. Keys that older configs lack get the values of `absent`.

    Raises:
      KeyError: model.reduce_at, model.fuse or keep.rate is missing.
      ValueError: there is no such reducer.
    """
    return TokenBudget.of_config(_BUDGET_DEFAULTS | dict(config))


def from_arrays(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, Any],
                reducer: Reducer | None = None) -> LoadedModel:
    """Returns the model for given weights.

    Args:
      path: origin of the weights, for error messages.
      arrays: weights by dotted name.
      metadata: 'config' (the nested config of a run) and, if known, 'class_names', 'model_config' and 'next_step'.
        'modules' names the reducer and the blocks of the learned modules, if they are not those of the config.
      reducer: replaces the reducer in the config.

    Raises:
      ValueError: the metadata names no known model, or the weights do not match the model.
    """
    settings = _DEFAULTS | workdirs.flat(metadata.get('config', {}))
    head = arrays.get('head.kernel')
    config = dataclasses.replace(config_of(path, metadata, settings), classes=0 if head is None else head.shape[-1])
    budget = saved_budget(settings)
    budget = budget._replace(reducer=reducer or budget.reducer)
    image_size = models.image_size_of(settings) or config.image_size
    modules = _modules_of(arrays, metadata.get('modules'), budget, config, image_size)
    like = jax.eval_shape(models.create(config, modules=modules).init, jax.random.key(0))
    class_names = ()
    if config.has_classes:
        class_names = metadata.get('class_names') or default_class_names(config.classes)
        if len(class_names) != config.classes:
            raise ValueError(f'the checkpoint in {path} names {len(class_names)} classes, its model has '
                             f'{config.classes}')
    mean, std = open_defaults.normalisation(settings)
    return LoadedModel(
        os.fspath(path), settings.get('model.name', CUSTOM), metadata.get('next_step', 0),
        weights.fitted(arrays, like, path), config, readable_names(class_names),
        image_size, mean, std, settings['data.eval_crop'] or None,
        machine.resolve_dtype(settings['model.dtype'], jax.default_backend()), budget, modules,
        settings['data.interpolation'] or weights.AS_DEIT['data.interpolation'], settings.get('base_model', ''))


def _modules_of(arrays, saved, budget, config, image_size):
    """Returns the learned modules in the arrays of a model, with the saved description of them, if there is one."""
    if saved:
        return modules_of(get_reducer(saved['reducer']), arrays, blocks=saved['blocks'], tokens=saved.get('tokens', ()))
    trained = budget.modules(config.patches(image_size), config.depth, config.macs)
    return modules_of(budget.reducer, arrays, blocks=budget.reduce_at, tokens=trained.tokens)


def config_of(path: str | os.PathLike, metadata: Mapping[str, Any], settings: Mapping[str, Any]) -> ViTConfig:
    """Returns the model config of weights: the stored one, or else that of the named model.

    Args:
      path: origin of the weights, for the error message.
      metadata: metadata of a checkpoint, or the flat config of a run.
      settings: flat config of the weights.

    Raises:
      ValueError: the metadata name no known model.
    """
    if model_configs.KEY in metadata:
        return model_configs.from_json(metadata[model_configs.KEY])
    if 'model.name' not in settings:
        raise ValueError(f'the checkpoint in {path} names no model (model.name of its config)')
    return models.config_from_flat(settings)


def _requested(keep_rate, keep_rates, tokens, r, macs, plan):
    """Returns the names of the given arguments, for error messages. Raises a ValueError if there is more than one."""
    sequences = {'keep_rates': (keep_rates, '(0.9, 0.7)'), 'tokens': (tokens, '(137, 96)')}
    if hasattr(r, '__len__'):
        sequences['r'] = r, '(39, 31, 24)'
    for name, (values, example) in sequences.items():
        if isinstance(values, str | Set | Mapping) or not hasattr(values, '__len__'):
            raise ValueError(f'{name}={values!r} is no sequence: give a number for each '
                             f'{"block" if name == "r" else "reduction"}, as {name}={example}')
    given = {'keep rate': keep_rate is not None, 'keep rates': len(keep_rates) > 0, 'tokens': len(tokens) > 0,
             'r': r is not None, 'macs': macs is not None, 'plan': plan is not None}
    names = [name for name, is_given in given.items() if is_given]
    if len(names) > 1:
        raise ValueError(f'give only one of {" and ".join(names)}')
    return names


def _check_path(path):
    """Raises a ValueError if a local folder does not exist. `read_newest` checks bucket paths."""
    if storage.is_remote(path):
        return
    weights.check_is_workdir('the path of the weights', path)
    if not storage.as_path(path).is_dir():
        raise ValueError(f'there is no folder {path}: give the folder of a run')
