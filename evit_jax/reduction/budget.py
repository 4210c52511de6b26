"""Token budgets: keep rates, token counts, r or MACs of a config, and the plans that meet them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from evit_jax.reduction.plan import TokenPlan, make_plan, merge_plan, plan_of_macs, plans_of
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducer import Modules, Reducer, modules_at
from evit_jax.reduction.registry import get_reducer


class TokenBudget(NamedTuple):
    """The requested number of tokens: by `macs`, `r`, `tokens` or `rates`. The first of these that is set is used."""

    reducer: Reducer
    reduce_at: tuple[int, ...]    # blocks that reduce tokens, in any order
    fuse: bool                    # fuse dropped tokens if the reducer can
    rates: tuple[float, ...]      # keep rate of each block of `reduce_at`, in its order
    tokens: tuple[int, ...] = ()  # number of tokens kept at each block of `reduce_at`, in its order
    drop: tuple[int, ...] = ()    # number of tokens dropped at each block before others merge; needs `tokens`
    r: float = 0                  # number of tokens merged in every block
    decreasing: bool = False      # see `merge_plan`
    macs: float = 0.0             # fraction of the dense model's multiply-accumulates

    @classmethod
    def of_config(cls, flat: Mapping[str, Any]) -> 'TokenBudget':
        """Reads the budget from a flat config that has all keys of `model`, `reducer` and `keep`.

        Raises:
          ValueError: there is no such reducer.
        """
        reduce_at = tuple(flat['model.reduce_at'])
        return cls(get_reducer(flat['reducer.name']), reduce_at, flat['model.fuse'],
                   tuple(flat['keep.rates']) or (flat['keep.rate'],) * len(reduce_at), tuple(flat['keep.tokens']),
                   tuple(flat['keep.drop']), flat['reducer.r'], flat['reducer.decreasing'], flat['keep.macs'])

    @property
    def rate(self) -> float | None:
        """The keep rate if all reductions have the same keep rate, else None."""
        other = self.macs or self.r or self.tokens or len(set(self.rates)) != 1
        return None if other else self.rates[0]

    def at(self, rate: float) -> 'TokenBudget':
        """Returns a budget with one keep rate for all reductions."""
        return self._replace(rates=(rate,) * len(self.reduce_at), tokens=(), drop=(), r=0, macs=0.0)

    def apply_plan(self, plan_file: PlanFile) -> 'TokenBudget':
        """Returns the budget of a plan file, with the reducer of this budget unless the file names one."""
        return self._replace(reducer=get_reducer(plan_file.reducer or self.reducer), reduce_at=plan_file.reduce_at,
                             fuse=plan_file.fuse, rates=(1.0,) * len(plan_file.reduce_at), tokens=plan_file.tokens,
                             drop=plan_file.drop, r=0, macs=0.0)

    def modules(self, patches: int, depth: int, macs: Callable[[TokenPlan], int]) -> Modules:
        """Returns the learned modules of a model that is trained with this budget. For the arguments, see `plans`."""
        tokens = self.plans(patches, depth, macs)(1.0).tokens if self.reducer.has_sized_modules else ()
        return modules_at(self.reducer, self.reduce_at, tokens)

    def plans(self, patches: int, depth: int, macs: Callable[[TokenPlan], int]) -> Callable[[float], TokenPlan]:
        """Returns a function from the progress of a schedule in [0, 1] to a plan. Progress 0 is dense, 1 is the budget.

        Between them, `tokens` become keep rates that fall linearly. These plans drop no tokens before they merge; only
        the plan of progress 1 has the counts of `drop`.

        Args:
          macs: plan -> multiply-accumulates.

        Raises:
          ValueError: a value is out of range, also when the function is called; the message names the value.
        """
        if self.macs:
            family = plans_of(self.reducer, patches, depth, reduce_at=self.reduce_at, fuse=self.fuse,
                              decreasing=self.decreasing)
            return lambda progress: plan_of_macs(macs, 1 - (1 - self.macs) * progress, family)
        if self.r:
            merge = functools.partial(merge_plan, patches, depth, r=self.r, decreasing=self.decreasing,
                                      reducer=self.reducer)
            return lambda progress: merge(progress=progress)
        make = functools.partial(make_plan, patches, depth, reduce_at=self.reduce_at, fuse=self.fuse,
                                 reducer=self.reducer)
        final = make(rate=self.rates, tokens=self.tokens, drop=self.drop)
        rates = self.rates
        if self.tokens:
            entering = (patches, *final.counts[:-1])
            rates = [(final.keep[block] or entering[block]) / entering[block] for block in self.reduce_at]
        return lambda progress: (
            final if progress == 1 else make(rate=tuple(1 - (1 - rate) * progress for rate in rates)))
