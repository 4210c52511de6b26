"""Searches the token plan that changes the outputs of a model least, within a budget of time or MACs.

No labels are needed: each candidate plan runs on calibration images, and its outputs are compared with those of the
dense model. The search has three stages.

1. Methods: each reducer with the same falling number of removed tokens per block. The best one stays. The first
   reducer chooses whether the first blocks remove less.
2. Shape: how fast the number falls, how many tokens leave the first quarter of the blocks, how many are dropped late.
3. Blocks: tokens are removed in an earlier or later block, or dropped in place of merged.

A few images with large errors dominate a mean. The search therefore compares means of the square roots of the errors,
and stage 3 accepts a change only if it is larger than its standard error over the images.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from evit_jax.planning.blockwise import BlockwiseModel
from evit_jax.planning.fidelity import Fidelity
from evit_jax.planning.journal import Journal
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.reducer import Reducer

METHODS = ('prune_merge', 'prune_merge:mean', 'prune_merge:norm', 'tome')
# Number of token counts that stages 1 and 2 distinguish, and stage 3. Each pair of counts is a compiled program, and
# compiling takes most of the time of the first stages.
_COARSE_LEVELS, _LEVELS = 16, 32
_LEAST = 16           # at least one sixteenth of the patches stays
_MIN_GAIN = 0.01      # relative gain for which stage 2 changes the shape
_SIGNIFICANT = 1.0    # number of standard errors by which stage 3 must improve


class Shape(NamedTuple):
    """Describes how many tokens each of L blocks removes: block b removes (1 - b / L)^power times a common number."""

    power: float = 1.0    # 0: equal numbers in all blocks
    early: float = 1.0    # factor for the first quarter of the blocks
    dropped: float = 0.0  # fraction of the tokens removed in the second half that is dropped, not merged


# Smaller removals in the first blocks are better at most budgets, and far worse at the smallest.
_FIRST_SHAPES = (Shape(early=0.5), Shape())
_CHANGES = [{'early': 0.33}, {'early': 0.15}, {'early': 0.5}, {'early': 0.75}, {'early': 1.0}, {'early': 1.5},
            {'power': 0.5}, {'power': 0.75}, {'power': 1.5}, {'power': 2.0}, {'dropped': 0.2}, {'dropped': 0.4}]


class Candidate(NamedTuple):
    """A plan and the tokens that it removes."""

    plan: TokenPlan
    removed: tuple[int, ...]  # number of tokens that each block removes, by merging or dropping
    dropped: tuple[int, ...]  # number of these that are dropped


class Found(NamedTuple):
    """The result of a search."""

    plan: TokenPlan
    error: float     # mean error on the images of the search
    evaluated: int   # number of plans evaluated
    seconds: float
    finished: bool   # False: the time was up before a whole sweep of stage 3 found no better plan
    methods: dict[str, float]  # reducer -> mean error in stage 1


class TimeUp(Exception):
    """Raised if a search has no time left."""


class PlanSearch:
    """Searches plans for one model and set of images. Evaluated plans are remembered across budgets."""

    def __init__(self, model: BlockwiseModel, fidelity: Fidelity, *, journal: Journal | None = None):
        """Creates a search.

        Args:
          journal: stores the errors of evaluated plans; None: they are kept in memory.
        """
        self._model, self._fidelity = model, fidelity
        self._patches, self._depth = model.patches, model.config.depth
        self._errors: dict[TokenPlan, np.ndarray] = {}
        self._journal = journal or Journal()

    def find(self, cost: Callable[[TokenPlan], float], budget: float, reducers: Sequence[Reducer],
             seconds: float) -> Found:
        """Returns the best plan within a budget.

        Args:
          cost: plan -> cost, in any unit.
          budget: largest cost of the plan, in the same unit.
          reducers: the methods to choose among.
          seconds: time limit; the best plan so far is returned when it is over.

        Raises:
          ValueError: no plan is within the budget.
        """
        self._cost, self._budget, self._best = cost, budget, None
        self._begin, self._limit, before = time.monotonic(), seconds, len(self._errors)
        self._quantum, methods, finished = max(self._patches // _COARSE_LEVELS, 1), {}, False
        try:
            shape = self._choose_method(reducers, methods)
            self._improve_shape(self._best.plan.reducer, shape)
            self._improve_blocks()
            finished = True
        except (TimeUp, KeyboardInterrupt) as stop:
            if self._best is None:
                raise ValueError(f'no plan was evaluated within {seconds:.0f} s: give more --minutes, or fewer '
                                 'images') from stop
            logging.info('the search ends with the best plan so far (%s)', 'time is up' if isinstance(stop, TimeUp)
                         else 'interrupted')
        plan = self._best.plan
        return Found(plan, self._error(plan), len(self._errors) - before, time.monotonic() - self._begin, finished,
                     methods)

    def _choose_method(self, reducers, methods) -> Shape:
        """Evaluates each reducer that reaches the budget. Returns the shape of the best plan.

        Args:
          methods: dict to which the mean error of each reducer is added.
        """
        shape, able = Shape(), [reducer for reducer in reducers if self._fit(reducer, Shape())]
        if not able:
            raise ValueError(self._too_expensive(reducers))
        for number, reducer in enumerate(able):
            for tried in _FIRST_SHAPES if number == 0 else (shape,):
                if candidate := self._fit(reducer, tried):
                    shape = tried if self._consider(candidate, 'method') else shape
                    error = self._error(candidate.plan)
                    methods[reducer.name] = min(error, methods.get(reducer.name, error))
        return shape

    def _too_expensive(self, reducers) -> str:
        """Returns the text of the error that no reducer reaches the budget."""
        cheapest = [self._candidate(reducer, self._removed(reducer, Shape(), self._patches)) for reducer in reducers]
        costs = ', '.join(f'{self._cost(each.plan):.3g} by {each.plan.reducer.name}' for each in cheapest)
        return (f'no plan costs at most {self._budget:.3g}; the cheapest plans cost {costs}: give a less ambitious '
                'target')

    def _improve_shape(self, reducer, shape):
        """Changes one value of the shape at a time while it helps."""
        improved = True
        while improved:
            improved = False
            for change in _CHANGES:
                changed = shape._replace(**change)
                if changed == shape or (changed.dropped and not reducer.can_drop):
                    continue
                candidate = self._fit(reducer, changed)
                if candidate and self._consider(candidate, str(changed), gain=_MIN_GAIN):
                    shape, improved = changed, True

    def _improve_blocks(self):
        """Moves removed tokens between blocks until a whole sweep finds no better plan."""
        self._quantum, best = max(self._patches // _LEVELS, 1), None
        while self._best != best:
            best = self._best
            self._model.set_base(best.plan)
            for candidate in self._neighbours():
                if self._consider(candidate, 'blocks', standard_errors=_SIGNIFICANT):
                    self._model.set_base(candidate.plan)

    def _neighbours(self) -> Iterator[Candidate]:
        """Yields the candidates within the budget that differ from the best one by one move.

        The best one may change meanwhile. A move removes fewer tokens at one block, and as many more at another as the
        budget needs. Other moves change the number of tokens that a block drops.
        """
        quantum, depth = self._quantum, self._depth
        for distance, source, sign in itertools.product((1, 3), range(depth), (-1, 1)):
            target, (plan, removed, dropped) = source + sign * distance, self._best
            removed = list(removed)
            removed[source] -= quantum
            for _ in range(5 if 0 <= target < depth else 1):
                candidate = self._candidate(plan.reducer, removed, dropped)
                if candidate and self._cost(candidate.plan) <= self._budget:
                    yield candidate
                    break
                if 0 <= target < depth:
                    removed[target] += quantum
        if self._best.plan.reducer.can_drop:
            for block, sign in itertools.product(range(depth), (1, -1)):
                plan, removed, dropped = self._best
                dropped = [*dropped[:block], dropped[block] + sign * quantum, *dropped[block + 1:]]
                if candidate := self._candidate(plan.reducer, removed, dropped):
                    yield candidate

    def _consider(self, candidate: Candidate, text: str, *, gain: float = 0.0, standard_errors: float = 0.0) -> bool:
        """Evaluates a candidate, and makes it the best one if its score is lower. Returns True in that case.

        Args:
          text: what was changed, for the log.
          gain: least relative gain.
          standard_errors: least gain, as a multiple of its standard error over the images.
        """
        scores = np.sqrt(self._evaluate(candidate.plan))
        if self._best:
            before = np.sqrt(self._errors[self._best.plan])
            gains = before - scores
            needed = max(gain * before.mean(), standard_errors * gains.std() / len(gains)**0.5)
            if gains.mean() <= needed:
                return False
        self._best = candidate
        logging.info('%.0f s of %.0f s, %d plans: error %.3f (%s), cost %.3g, %s', time.monotonic() - self._begin,
                     self._limit, len(self._errors), self._error(candidate.plan), text, self._cost(candidate.plan),
                     candidate.plan)
        return True

    def _evaluate(self, plan: TokenPlan) -> np.ndarray:
        """Returns the error of each image under a plan, [B]. Raises TimeUp if it is unknown and the time is over."""
        if plan not in self._errors:
            key = str(plan)
            errors = self._journal.get(key)
            if errors is None:
                if time.monotonic() - self._begin > self._limit:
                    raise TimeUp
                errors = self._fidelity.errors(self._model.outputs(plan))
                self._journal.add(key, errors)
            self._errors[plan] = errors
        return self._errors[plan]

    def _error(self, plan):
        return float(self._errors[plan].mean())

    def _fit(self, reducer, shape) -> Candidate | None:
        """Returns the candidate of a shape that removes as few tokens as the budget allows; None if there is none."""
        low, high, best = 0.0, 2.0, None
        for _ in range(30):
            middle = (low + high) / 2
            removed = self._removed(reducer, shape, middle * self._patches)
            dropped = [round(shape.dropped * count * (block >= len(removed) / 2) / self._quantum) * self._quantum
                       for block, count in enumerate(removed)]
            candidate = self._candidate(reducer, removed, dropped)
            if candidate and self._cost(candidate.plan) <= self._budget:
                high, best = middle, candidate
            else:
                low = middle
        return best

    def _removed(self, reducer, shape, most) -> list[int]:
        """Returns the number of tokens that each block removes, in whole quanta; `most` is the common number."""
        depth, n, total, removed = self._depth, self._patches, 0.0, []
        for block in range(depth):
            total += most * (1 - block / depth)**shape.power * (shape.early if block < depth / 4 else 1)
            count = round(total / self._quantum) * self._quantum - (self._patches - n)  # rounds sums
            removed.append(max(min(count, n - self._least(reducer, n)), 0))
            n -= removed[-1]
        return removed

    def _candidate(self, reducer, removed, dropped=()) -> Candidate | None:
        """Returns the candidate that removes these tokens; None if it is not valid."""
        dropped = tuple(dropped) or (0,) * len(removed)
        n, tokens = self._patches, {}
        for block, (count, drop) in enumerate(zip(removed, dropped, strict=True)):
            if not 0 <= drop <= count or n - count < self._least(reducer, n - drop):
                return None
            n -= count
            if count:
                tokens[block] = n
        plan = make_plan(self._patches, self._depth, tokens=[*tokens.values()] or None, fuse=False,
                         drop=[dropped[block] for block in tokens], reduce_at=[*tokens], reducer=reducer)
        return Candidate(plan, tuple(removed), dropped)

    def _least(self, reducer, n):
        """Returns the least number of tokens that may stay of n tokens."""
        return max(reducer.min_kept(n), self._patches // _LEAST)
