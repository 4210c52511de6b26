"""How many tokens are asked to stay where, as a config or a person says it, and the plans that come of it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from evit_jax.configs.base import absent
from evit_jax.reduction import reducers
from evit_jax.reduction.plan import TokenPlan, make_plan, merge_plan, plan_of_macs, plans_of
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import Reducer

_ABSENT = absent('reducer.name', 'reducer.r', 'reducer.decreasing', 'keep.rates', 'keep.tokens', 'keep.macs')


class TokenBudget(NamedTuple):
    """Of `macs`, `r` and `tokens` the first that is given counts; where none is, the rates do."""

    reducer: Reducer
    reduce_at: tuple[int, ...]    # blocks, in any order
    fuse: bool                    # where the reducer can
    rates: tuple[float, ...]      # one for each block of `reduce_at`, in its order
    tokens: tuple[int, ...] = ()  # kept at each block of `reduce_at`, in its order
    r: float = 0                  # tokens merged in every block
    decreasing: bool = False      # see `merge_plan`
    macs: float = 0.0             # share of the dense model's multiply-accumulates

    @classmethod
    def of_config(cls, flat: Mapping[str, Any]) -> 'TokenBudget':
        """What the dotted keys of a config ask for.

        Raises:
          ValueError: no such reducer.
        """
        told = _ABSENT | dict(flat)
        at = tuple(told['model.reduce_at'])
        return cls(reducers.get_reducer(told['reducer.name']), at, told['model.fuse'],
                   tuple(told['keep.rates']) or (told['keep.rate'],) * len(at), tuple(told['keep.tokens']),
                   told['reducer.r'], told['reducer.decreasing'], told['keep.macs'])

    @property
    def rate(self) -> float | None:
        """The one rate of all reductions, if that is what is asked."""
        other = self.macs or self.r or self.tokens or len(set(self.rates)) != 1
        return None if other else self.rates[0]

    def at(self, rate: float) -> 'TokenBudget':
        """The same at one rate."""
        return self._replace(rates=(rate,) * len(self.reduce_at), tokens=(), r=0, macs=0.0)

    def following(self, planned: PlanFile) -> 'TokenBudget':
        """The same reducer under a plan from a file."""
        return self._replace(reduce_at=planned.reduce_at, fuse=planned.fuse, tokens=planned.tokens,
                             rates=(1.0,) * len(planned.reduce_at), r=0, macs=0.0)

    def plans(self, patches: int, depth: int, macs: Callable[[TokenPlan], int]) -> Callable[[float], TokenPlan]:
        """Progress of a schedule in [0, 1] -> plan: dense at 0, what is asked for at 1.

        Args:
          macs: of a plan.

        Raises:
          ValueError: now or when called, a value out of range; names it.
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
        final = make(tokens=self.tokens) if self.tokens else make(rate=self.rates)
        rates = self.rates
        if self.tokens:
            entering = (patches, *final.counts[:-1])
            rates = [(final.keep[block] or entering[block]) / entering[block] for block in self.reduce_at]
        return lambda progress: (
            final if progress == 1 else make(rate=tuple(1 - (1 - rate) * progress for rate in rates)))


def check_predictors(plan: TokenPlan, trained_at: Sequence[int]) -> None:
    """Raises a ValueError if a reduction of the plan would use the predictor that was trained for another block.

    Predictors are numbered by reduction, in ascending order of the blocks.

    Args:
      trained_at: blocks that the predictors were trained at, in any order.
    """
    trained_at = tuple(sorted(trained_at))
    wrong = [pair for pair in zip(plan.reductions, trained_at) if pair[0] != pair[1]]
    if plan.reducer.predicts and wrong:
        block, trained = wrong[0]
        raise ValueError(f'{plan.reducer} would use the predictor trained at block {trained} at block {block}: its '
                         f'predictors were trained at the blocks {trained_at}, and the plan reduces at '
                         f'{plan.reductions}: keep the trained blocks, or choose another reducer')
