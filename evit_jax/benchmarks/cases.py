"""What is measured of the models: every combination of what the lists name."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from evit_jax import models
from evit_jax.benchmarks.measured import MeasuredModel, find_model
from evit_jax.models.config import ViTConfig
from evit_jax.reduction import reducers
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import EVIT, Reducer

DTYPES = 'float32', 'bfloat16'


class Case(NamedTuple):
    """One combination."""

    model: str
    rate: float
    fused: bool       # False where nothing is dropped
    size: int         # of the image; the model is one made for it
    batch: int
    dtype: str        # of the computation
    reduce_at: tuple[int, ...]
    train: bool = False  # the training step, in place of the forward pass
    reducer: Reducer = EVIT
    r: int = 0           # tokens that every block merges, in place of the rate
    tokens: tuple[int, ...] = ()  # kept at each reduction, in place of the rate
    gather_impl: str = ''   # how reductions move tokens; '': as is best where it runs
    run: str = ''        # folder of the run whose model it is; '': the named model
    run_config: ViTConfig | None = None  # config of the run's model

    @property
    def config(self) -> ViTConfig:
        return dataclasses.replace(self.run_config or models.get_config(self.model), image_size=self.size,
                                   predictors=len(self.reduce_at) if self.reducer.predicts else 0)

    @property
    def plan(self) -> TokenPlan:
        config, rates = self.config, (self.rate,) * len(self.reduce_at)
        budget = TokenBudget(self.reducer, self.reduce_at, self.fused, rates, self.tokens, self.r)
        return budget.plans(config.patches(self.size), config.depth, config.macs)(1.0)

    @property
    def macs(self) -> int:
        """Of one image, forward, as the papers count them."""
        return self.config.macs(self.plan.in_training() if self.train else self.plan)

    @property
    def executed_macs(self) -> int:
        """Of one image's logits, as the model computes them."""
        return self.config.executed_macs(self.plan)

    @property
    def dense(self) -> 'Case':
        """The same without dropping."""
        return self._replace(rate=1.0, fused=False, reducer=EVIT, reduce_at=(), r=0, tokens=(), gather_impl='')

    def __str__(self) -> str:
        how = 'merged' if self.reducer.merges else 'fused' if self.fused else 'not fused'
        asked = f'{"-".join(map(str, self.tokens))} at {self.reduce_at}' if self.tokens else f'{self.rate:g}'
        kept = f'{f"r={self.r}" if self.r else asked} {how}' if self.plan.reductions else 'dense'
        kept += '' if self.reducer == EVIT else f', {self.reducer}'
        kept += f' by {self.gather_impl}' if self.gather_impl else ''
        step = ', train' if self.train else ''
        return f'{self.run or self.model} {kept}, {self.size} px, batch {self.batch}, {self.dtype}{step}'


def choices(flag: str, words: Sequence[str] | None, known: dict[str, Any]) -> list[Any] | None:
    """The values that the words of a flag stand for; None for a flag that is not given.

    Raises:
      ValueError: one is unknown.
    """
    if words is None:
        return None
    for word in words:
        if word not in known:
            raise ValueError(f'{flag}={",".join(words)}: {word!r} is unknown, there are {", ".join(known)}')
    return [known[word] for word in words]


def combine(*, names: Sequence[str], rates: Sequence[float], batches: Sequence[int],
            fuse: Sequence[bool] | None = None, sizes: Sequence[int] = (), dtypes: Sequence[str] | None = None,
            reduce_at: Sequence[int] = (), train: bool = False, methods: Sequence[str] | None = None,
            merged: Sequence[int] = (), planned: Sequence[PlanFile] = (),
            gather_impls: Sequence[str] = ('',)) -> list[Case]:
    """Every combination once: where nothing is dropped, nothing is fused either, and every method is the same.

    The plan of a run is a case beside those of the rates.

    Args:
      names: models by name, and folders of runs.
      fuse, sizes, dtypes, reduce_at, methods: each model's own, where they are not given. A named model fuses, is
        computed in float32, and reduces by EViT at a quarter, half and three quarters of its depth.
      sizes: image sizes.
      reduce_at: blocks that drop tokens.
      train: each one's training step too.
      methods: names of reducers; one that cannot fuse does not.
      merged: tokens that every block merges, beside the rates; of the reducers that merge.
      planned: plans that are measured beside the rates, each by every method.
      lowerings: ways to move what is kept, of the reducers that keep by rank; '': the platform's.

    Raises:
      ValueError: an empty list, or a value that cannot be.
    """
    _check_lists(models=names, reducers=methods, rates=rates, fuse=fuse, batches=batches, dtypes=dtypes)
    reducing = None if methods is None else [reducers.get_reducer(method) for method in methods]
    measured = [find_model('--models', name) for name in names]
    _check_merging(merged, [reducer for one in measured for reducer in reducing or [one.budget.reducer]])
    unclaimed = [plan for plan in planned if plan.model not in {one.name for one in measured}]
    found = {}
    for one in measured:
        sizes_of, reducers_of = sizes or [one.image_size], reducing or [one.budget.reducer]
        plans = [plan for plan in planned if plan.model == one.name] + unclaimed  # these are refused
        for plan, size in itertools.product(plans, sizes_of):
            plan.check(one.name, one.config.patches(size), one.config.depth)
        by_plan = [_way(reducer, plan.fuse, plan.reduce_at, tokens=plan.tokens)
                   for plan, reducer in itertools.product(plans, reducers_of)]
        by_rate = _ways(one, rates, merged, reducers_of, tuple(sorted(reduce_at)) or one.blocks,
                        [one.budget.fuse] if fuse is None else fuse)
        own_size = [one.image_size] if one.run and one.image_size in sizes_of else []
        for ways, of in ((by_rate, sizes_of), ([_own(one)], own_size), (by_plan, sizes_of)):
            for step, size, batch, dtype in itertools.product((False, True)[:1 + train], of, batches,
                                                              dtypes or [one.dtype]):
                case = Case(one.name, 1.0, False, size, batch, dtype, (), step, run=one.run,
                            run_config=one.config if one.run else None)
                for way in ways:
                    found |= _moved(case._replace(**way), gather_impls)
    return list(found)


def _ways(one: MeasuredModel, rates, merged, reducing, at, fuse) -> list[dict[str, Any]]:
    """Fields of a case for each rate, then for each r, by each reducer.

    Raises:
      ValueError: there is no block that could drop tokens.
    """
    if not at and any(rate != 1 for rate in rates):
        raise ValueError(f'{one.run} drops tokens at no block (model.reduce_at is empty), and '
                         f'--rates={",".join(f"{rate:g}" for rate in rates)} would all be dense: give --reduce_at, or '
                         '--rates=1')
    amounts = [(rate, 0, reducer) for rate, reducer in itertools.product(rates, reducing)]
    amounts += [(1.0, r, reducer) for r, reducer in itertools.product(merged, reducing) if reducer.merges]
    return [_way(reducer, fused, at, rate=rate, r=r) for (rate, r, reducer), fused in itertools.product(amounts, fuse)]


def _own(one: MeasuredModel) -> dict[str, Any]:
    """The plan of a run, as fields of a case."""
    budget = one.budget
    if budget.rate is not None:
        return _way(budget.reducer, budget.fuse, one.blocks, rate=budget.rate)
    if budget.r and not budget.macs and not budget.decreasing and budget.r == int(budget.r):
        return _way(budget.reducer, budget.fuse, one.blocks, r=int(budget.r))
    plan = one.plan()
    return _way(budget.reducer, plan.fused, plan.reductions, tokens=tuple(plan.keep[at] for at in plan.reductions))


def _way(reducer, fused, reduce_at, **amounts):
    return {'reducer': reducer, 'fused': fused and reducer.fuses, 'reduce_at': reduce_at} | amounts


def _check_lists(**lists):
    if empty := [flag for flag, values in lists.items() if values is not None and not values]:
        raise ValueError(f'--{empty[0]} is empty: give at least one')
    if low := [batch for batch in lists['batches'] if batch < 1]:
        raise ValueError(f'--batches={",".join(map(str, lists["batches"]))}: a batch of {low[0]} has no image, give 1 '
                         'or more')


def _check_merging(merged, reducing):
    if merged and not any(reducer.merges for reducer in reducing):
        raise ValueError(f'--r={",".join(map(str, merged))} is of reducers that merge, and of '
                         f'--reducers={",".join(dict.fromkeys(map(str, reducing)))} none does: add tome or pool, or '
                         'leave --r out')


def _moved(case, gather_impls):
    """The case by each gather_impl, as keys; once, where nothing is dropped or it is merged."""
    if not case.plan.reductions:
        return {case.dense: None}
    return {case._replace(gather_impl='' if case.reducer.merges else gather_impl): None for gather_impl in gather_impls}
