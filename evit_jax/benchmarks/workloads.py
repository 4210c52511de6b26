"""Workloads to benchmark: all combinations of the models, plans, sizes and dtypes in the flags."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.benchmarks import torch_evit
from evit_jax.benchmarks.benchmark_model import BenchmarkModel, find_model
from evit_jax.checkpoints.model_digest import digest_of_architecture
from evit_jax.models.config import ImageSize, ViTConfig, size_text
from evit_jax.reduction import registry
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import Modules, Reducer
from evit_jax.reduction.reducers import EVIT


class Workload(NamedTuple):
    """One combination of model, plan, image size, batch size and dtype."""

    model: str
    rate: float
    fused: bool          # True if dropped tokens are fused; False if no token is dropped
    image_size: ImageSize
    batch_size: int
    dtype: str           # dtype of the computation
    reduce_at: tuple[int, ...]
    train: bool = False  # True to measure the training step instead of the forward pass
    reducer: Reducer = EVIT
    r: int = 0           # number of tokens merged in every block; overrides the rate unless 0
    tokens: tuple[int, ...] = ()  # number of tokens kept at each reduction; overrides the rate unless empty
    drop: tuple[int, ...] = ()    # number of tokens dropped at each reduction before others merge; needs `tokens`
    gather_impl: str = ''         # implementation of the gather in reductions; '' selects the platform's best
    run: str = ''                 # folder of the run that the model belongs to; '' for a named model
    run_config: ViTConfig | None = None  # config of the run's model

    @property
    def config(self) -> ViTConfig:
        return dataclasses.replace(self.run_config or models.get_config(self.model), image_size=self.image_size)

    @property
    def modules(self) -> Modules:
        """The learned modules that the reducer needs in the model."""
        return self._budget.modules(self.config.patches(self.image_size), self.config.depth, self.config.macs)

    @property
    def plan(self) -> TokenPlan:
        config = self.config
        return self._budget.plans(config.patches(self.image_size), config.depth, config.macs)(1.0)

    @property
    def _budget(self):
        rates = (self.rate,) * len(self.reduce_at)
        return TokenBudget(self.reducer, self.reduce_at, self.fused, rates, self.tokens, self.drop, self.r)

    @property
    def macs(self) -> int:
        """MACs of the forward pass of one image, counted as in the papers."""
        return self.config.macs(self.plan.in_training() if self.train else self.plan)

    @property
    def executed_macs(self) -> int:
        """MACs that are actually executed to compute the logits of one image."""
        return self.config.executed_macs(self.plan)

    @property
    def dense(self) -> 'Workload':
        """The same workload without token reduction."""
        return self._replace(rate=1.0, fused=False, reducer=EVIT, reduce_at=(), r=0, tokens=(), drop=(),
                             gather_impl='')

    def __str__(self) -> str:
        action = 'merged' if self.reducer.merges else 'fused' if self.fused else 'not fused'
        amount = f'{"-".join(map(str, self.tokens))} at {self.reduce_at}' if self.tokens else f'{self.rate:g}'
        amount += f', dropping {"-".join(map(str, self.drop))},' if self.drop else ''
        reduction = f'{f"r={self.r}" if self.r else amount} {action}' if self.plan.reductions else 'dense'
        reduction += '' if self.reducer == EVIT else f', {self.reducer}'
        reduction += f' by {self.gather_impl}' if self.gather_impl else ''
        step = ', train' if self.train else ''
        return (f'{self.run or self.model} {reduction}, {size_text(self.image_size)} px, batch {self.batch_size}, '
                f'{self.dtype}{step}')


class WorkloadLists(NamedTuple):
    """Lists of values to combine. None, or an empty list of sizes or blocks, selects the default of each model.

    Defaults of a named model: fusion, float32, and EViT at a quarter, half and three quarters of the depth.
    """

    names: Sequence[str]         # names of models, and folders of runs
    rates: Sequence[float]       # keep rates; 1 is dense
    batch_sizes: Sequence[int]
    fuse: Sequence[bool] | None = None
    image_sizes: Sequence[ImageSize] = ()
    dtypes: Sequence[str] | None = None
    reduce_at: Sequence[int] = ()           # blocks that reduce tokens
    train: bool = False                     # True to also measure the training step of each workload
    reducers: Sequence[str | Reducer] | None = None  # a reducer that cannot fuse is measured without fusion
    r: Sequence[int] = ()                   # numbers of tokens to merge in every block, in addition to the rates
    plans: Sequence[PlanFile] = ()          # plans to measure in addition to the rates; see `reductions_of_plans`
    gather_impls: Sequence[str] = ('',)     # gathers of reducers that keep tokens by rank; '' is the platform's best


def parse_choices(flag: str, words: Sequence[str] | None, choices: dict[str, Any]) -> list[Any] | None:
    """Maps the words of a flag to their values. Returns None if the flag is not set.

    Raises:
      ValueError: a word is not one of the choices.
    """
    if words is None:
        return None
    for word in words:
        if word not in choices:
            raise ValueError(f'{flag}={",".join(words)}: {word!r} is unknown, there are {", ".join(choices)}')
    return [choices[word] for word in words]


def combine(lists: WorkloadLists) -> list[Workload]:
    """Returns all distinct combinations. Dense combinations of a model that differ in their reduction are equal.

    The plan of a run is added to the plans of the rates.

    Raises:
      ValueError: a list is empty, or a value is out of range.
    """
    _check_lists(lists)
    requested = None if lists.reducers is None else [registry.get_reducer(name) for name in lists.reducers]
    selected = [find_model('--models', name) for name in lists.names]
    _check_merging(lists.r, [reducer for model in selected for reducer in requested or [model.budget.reducer]])
    unmatched = [plan for plan in lists.plans if not any(is_for(plan, model) for model in selected)]
    workloads = {}
    for model in selected:
        sizes = lists.image_sizes or [model.image_size]
        plans = [plan for plan in lists.plans if is_for(plan, model)] + unmatched  # refused by `reductions_of_plans`
        own_reducers = requested or [model.budget.reducer]
        by_rate = _reductions(model, lists, own_reducers)
        by_plan = [(reductions_of_plans(plans, model, size, own_reducers), [size]) for size in sizes]
        trained_size = [model.image_size] if model.run and model.image_size in sizes else []
        for reductions, at_sizes in (by_rate, sizes), ([_trained_reduction(model)], trained_size), *by_plan:
            for step, size, batch, dtype in itertools.product((False, True)[:1 + lists.train], at_sizes,
                                                              lists.batch_sizes, lists.dtypes or [model.dtype]):
                workload = Workload(model.name, 1.0, False, size, batch, dtype, (), step, run=model.run,
                                    run_config=model.config if model.run else None)
                for reduction in reductions:
                    workloads |= _with_gathers(workload._replace(**reduction), lists.gather_impls)
    return list(workloads)


def _reductions(model: BenchmarkModel, lists: WorkloadLists, own_reducers: Sequence[Reducer]) -> list[dict[str, Any]]:
    """Returns the workload fields for each rate and each r, combined with each reducer.

    Raises:
      ValueError: a rate is below 1, but no block reduces tokens.
    """
    reduce_at = tuple(sorted(lists.reduce_at)) or model.blocks
    if not reduce_at and any(rate != 1 for rate in lists.rates):
        raise ValueError(f'{model.run} drops tokens at no block (model.reduce_at is empty), and '
                         f'--rates={",".join(f"{rate:g}" for rate in lists.rates)} would all be dense: give '
                         '--reduce_at, or --rates=1')
    amounts = [(rate, 0, reducer) for rate, reducer in itertools.product(lists.rates, own_reducers)]
    amounts += [(1.0, r, reducer) for r, reducer in itertools.product(lists.r, own_reducers) if reducer.merges]
    fuse = [model.budget.fuse] if lists.fuse is None else lists.fuse
    return [_reduction(reducer, fused, reduce_at, rate=rate, r=r)
            for (rate, r, reducer), fused in itertools.product(amounts, fuse)]


def is_for(plan: PlanFile, model: BenchmarkModel) -> bool:
    """Returns True if a plan file is for the architecture of a model."""
    return plan.is_for(model.name, digest_of_architecture(model.config))


def reductions_of_plans(plans: Sequence[PlanFile], model: BenchmarkModel, image_size: int,
                         own_reducers: Sequence[Reducer]) -> list[dict[str, Any]]:
    """Returns the workload fields for plan files: with the reducer of the file, or else with each of the reducers.

    Raises:
      ValueError: a plan is for another model.
    """
    fitted = [plan.for_model(model.name, model.config.patches(image_size), model.config.depth,
                             digest_of_architecture(model.config)) for plan in plans]
    return [_reduction(reducer, plan.fuse, plan.reduce_at, tokens=plan.tokens, drop=plan.drop) for plan in fitted
            for reducer in ([registry.get_reducer(plan.reducer)] if plan.reducer else own_reducers)]


def _trained_reduction(model: BenchmarkModel) -> dict[str, Any]:
    """Returns the workload fields for the plan of a run."""
    budget = model.budget
    if budget.rate is not None:
        return _reduction(budget.reducer, budget.fuse, model.blocks, rate=budget.rate)
    if budget.r and not budget.macs and not budget.decreasing and budget.r == int(budget.r):
        return _reduction(budget.reducer, budget.fuse, model.blocks, r=int(budget.r))
    plan = model.plan()
    return _reduction(budget.reducer, plan.fused, plan.reductions, tokens=plan.tokens, drop=plan.dropped)


def _reduction(reducer, fused, reduce_at, **amounts):
    return {'reducer': reducer, 'fused': fused and reducer.can_fuse, 'reduce_at': reduce_at} | amounts


def _check_lists(lists: WorkloadLists) -> None:
    flags = {'models': lists.names, 'reducers': lists.reducers, 'rates': lists.rates, 'fuse': lists.fuse,
             'batches': lists.batch_sizes, 'dtypes': lists.dtypes}
    if empty := [flag for flag, values in flags.items() if values is not None and not values]:
        raise ValueError(f'--{empty[0]} is empty: give at least one')
    if low := [batch for batch in lists.batch_sizes if batch < 1]:
        raise ValueError(f'--batches={",".join(map(str, lists.batch_sizes))}: a batch of {low[0]} has no image, give 1 '
                         'or more')


def _check_merging(merged, selected):
    if merged and not any(reducer.merges for reducer in selected):
        raise ValueError(f'--r={",".join(map(str, merged))} is for reducers that merge, and none of '
                         f'--reducers={",".join(dict.fromkeys(map(str, selected)))} does: add tome or pool, or leave '
                         '--r out')


def _with_gathers(workload, gather_impls):
    """Returns a dict whose keys are the workload with each gather implementation.

    A workload that gathers nothing by rank occurs once.
    """
    if not workload.plan.reductions:
        return {workload.dense: None}
    return {workload._replace(gather_impl='' if workload.reducer.merges else gather_impl): None
            for gather_impl in gather_impls}


def check_torch(selected: Sequence[Workload]) -> None:
    """Raises a ValueError if our PyTorch model does not implement a model. Warns of reducers that it lacks."""
    for workload in selected:
        torch_evit.check_config(workload.config)
    if other := [workload for workload in selected if workload.reducer != EVIT]:
        logging.warning('--against=torch implements EViT only: %s and others are measured without it', other[0])
