"""Searches the token plan that changes the outputs of a model least, within a budget of time or MACs.

No labels are needed: each candidate plan runs on calibration images, and its outputs are compared with those of the
dense model. The search has three stages.

1. Methods: each reducer with the same falling number of removed tokens per block. The best one stays.
2. Shape: how fast the number falls, how many tokens leave the first quarter of the blocks, how many are dropped late.
3. Blocks: tokens are removed in an earlier or later block, or dropped in place of merged.

A few images with large errors dominate a mean. The search therefore compares means of the square roots of the errors,
and stage 3 accepts a change only if it is larger than its standard error over the images.
"""

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from evit_jax.planning.blockwise import BlockwiseModel
from evit_jax.planning.fidelity import Fidelity
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.reducer import Reducer

METHODS = ('prune_merge', 'prune_merge:mean', 'prune_merge:norm', 'tome')
_LEVELS = 32          # number of token counts that the search distinguishes; each pair of counts is a compiled program
_LEAST = 16           # at least one sixteenth of the patches stays
_MIN_GAIN = 0.01      # relative gain for which stage 2 changes the shape
_SIGNIFICANT = 1.0    # number of standard errors by which stage 3 must improve


class Shape(NamedTuple):
    """How the removed tokens are distributed over the L blocks: block b removes (1 - b / L)^power of the most."""

    power: float = 1.0    # 0: equal numbers in all blocks
    early: float = 1.0    # factor for the first quarter of the blocks
    dropped: float = 0.0  # fraction of the tokens removed in the second half that is dropped, not merged


_CHANGES = [{'early': 0.5}, {'early': 0.75}, {'early': 1.5}, {'power': 0.5}, {'power': 0.75}, {'power': 1.5},
            {'power': 2.0}, {'dropped': 0.2}, {'dropped': 0.4}]


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

    def __init__(self, model: BlockwiseModel, fidelity: Fidelity, cost: Callable[[TokenPlan], float], *,
                 journal: 'Journal | None' = None):
        """Creates a search.

        Args:
          cost: plan -> cost, in the unit of the budgets.
          journal: stores the errors of evaluated plans; None: they are kept in memory.
        """
        self._model, self._fidelity, self._cost, self._config = model, fidelity, cost, model.config
        self._patches = model.patches
        self._quantum = max(self._patches // _LEVELS, 1)
        self._errors: dict[TokenPlan, np.ndarray] = {}
        self._journal = journal or Journal()

    def find(self, budget: float, reducers: Sequence[Reducer], seconds: float) -> Found:
        """Returns the best plan within a budget.

        Args:
          budget: largest cost of the plan.
          reducers: the methods to choose among.
          seconds: time limit; the best plan so far is returned when it is over.

        Raises:
          ValueError: no plan is within the budget.
        """
        self._begin, self._limit, before = time.monotonic(), seconds, len(self._errors)
        self._best: Candidate | None = None
        methods, finished = {}, False
        try:
            shape, reducer = Shape(), None
            for candidate in self._fitting(reducers, shape, budget):
                methods[candidate.plan.reducer.name] = self._try(candidate, 'method')
            reducer = self._best.plan.reducer
            self._improve_shape(reducer, shape, budget)
            finished = self._improve_blocks(budget)
        except (TimeUp, KeyboardInterrupt) as stop:
            if self._best is None:
                raise ValueError(f'no plan was evaluated within {seconds:.0f} s: give more --minutes, or fewer '
                                 'images') from stop
            logging.info('the search ends with the best plan so far (%s)', 'time is up' if isinstance(stop, TimeUp)
                         else 'interrupted')
        plan = self._best.plan
        return Found(plan, float(self._errors[plan].mean()), len(self._errors) - before,
                     time.monotonic() - self._begin, finished, methods)

    def _fitting(self, reducers, shape, budget) -> Iterator[Candidate]:
        """Yields the candidate of each reducer that reaches the budget."""
        least = {}
        for reducer in reducers:
            candidate = self._fit(reducer, shape, budget)
            if candidate is None:
                cheapest = self._candidate(reducer, self._removed(shape, self._patches, reducer), None)
                least[reducer.name] = self._cost(cheapest.plan)
            else:
                yield candidate
        if len(least) == len(reducers):
            costs = ', '.join(f'{cost:.3g} by {name}' for name, cost in least.items())
            raise ValueError(f'no plan costs at most {budget:.3g}; the cheapest plans cost {costs}: give a less '
                             'ambitious target')

    def _improve_shape(self, reducer, shape, budget):
        """Changes one value of the shape at a time while it helps."""
        improved = True
        while improved:
            improved = False
            for change in _CHANGES:
                changed = shape._replace(**change)
                if changed == shape or (changed.dropped and not reducer.can_drop):
                    continue
                candidate = self._fit(reducer, changed, budget)
                if candidate is not None and self._is_better(candidate, gain=_MIN_GAIN, text=str(changed)):
                    shape, improved = changed, True

    def _improve_blocks(self, budget) -> bool:
        """Moves removed tokens between blocks while it helps. Returns True after a sweep without improvement."""
        while True:
            self._model.set_base(self._best.plan)
            best = self._best
            for candidate in self._neighbours(budget):
                if self._is_better(candidate, standard_errors=_SIGNIFICANT, text='blocks'):
                    self._model.set_base(candidate.plan)
            if self._best == best:
                return True

    def _neighbours(self, budget: float) -> Iterator[Candidate]:
        """Yields the candidates within the budget that differ from the best one by one move.

        The best one may change meanwhile. A move removes fewer tokens at one block, and as many more at another as the
        budget needs.
        """
        quantum, depth = self._quantum, self._config.depth
        for distance, source, sign in itertools.product((1, 3), range(depth), (-1, 1)):
            target, removed = source + sign * distance, list(self._best.removed)
            removed[source] -= quantum
            for _ in range(5 if 0 <= target < depth else 1):
                candidate = self._candidate(self._best.plan.reducer, removed, self._best.dropped)
                if candidate is not None and self._cost(candidate.plan) <= budget:
                    yield candidate
                    break
                if 0 <= target < depth:
                    removed[target] += quantum
        if self._best.plan.reducer.can_drop:
            for block, sign in itertools.product(range(depth), (1, -1)):
                dropped = list(self._best.dropped)
                dropped[block] += sign * quantum
                candidate = self._candidate(self._best.plan.reducer, self._best.removed, dropped)
                if candidate is not None:
                    yield candidate

    def _is_better(self, candidate, *, gain=0.0, standard_errors=0.0, text):
        """Evaluates a candidate. Makes it the best one if it is better by a relative gain and by standard errors."""
        best = self._best
        score = self._try(candidate, text, keep=False)
        before, after = (np.sqrt(self._errors[each.plan]) for each in (best, candidate))
        difference = after - before
        needed = standard_errors * difference.std() / len(difference)**0.5
        if not (score < self._score(best) * (1 - gain) and difference.mean() < -needed):
            return False
        self._accept(candidate, text)
        return True

    def _try(self, candidate, text, keep=True):
        """Evaluates a candidate and returns its score. `keep`: makes it the best one if its score is lower."""
        if candidate.plan not in self._errors:
            if time.monotonic() - self._begin > self._limit:
                raise TimeUp
            key = str(candidate.plan)
            errors = self._journal.get(key)
            if errors is None:
                errors = self._fidelity.errors(self._model.outputs(candidate.plan))
                self._journal.add(key, errors)
            self._errors[candidate.plan] = errors
        score = self._score(candidate)
        if keep and (self._best is None or score < self._score(self._best)):
            self._accept(candidate, text)
        return float(self._errors[candidate.plan].mean()) if keep else score

    def _accept(self, candidate, text):
        self._best = candidate
        logging.info('%.0f s of %.0f s, %d plans: error %.3f (%s), cost %.3g, %s', time.monotonic() - self._begin,
                     self._limit, len(self._errors), self._errors[candidate.plan].mean(), text,
                     self._cost(candidate.plan), candidate.plan)

    def _score(self, candidate):
        return float(np.sqrt(self._errors[candidate.plan]).mean())

    def _fit(self, reducer, shape, budget) -> Candidate | None:
        """Returns the candidate of a shape that removes as few tokens as the budget allows; None if there is none."""
        low, high, best = 0.0, 2.0, None
        for _ in range(30):
            middle = (low + high) / 2
            removed = self._removed(shape, middle * self._patches, reducer)
            dropped = [round(shape.dropped * count * (block >= len(removed) / 2) / self._quantum) * self._quantum
                       for block, count in enumerate(removed)]
            candidate = self._candidate(reducer, removed, dropped)
            if candidate is not None and self._cost(candidate.plan) <= budget:
                high, best = middle, candidate
            else:
                low = middle
        return best

    def _removed(self, shape, most, reducer):
        """Returns the number of tokens that each block removes, in whole quanta; the first block removes `most`."""
        depth, n, total, removed = self._config.depth, self._patches, 0.0, []
        for block in range(depth):
            total += most * (1 - block / depth)**shape.power * (shape.early if block < depth / 4 else 1)
            least = max(reducer.min_kept(n), self._patches // _LEAST)
            count = round(total / self._quantum) * self._quantum - (self._patches - n)  # rounds sums
            removed.append(max(min(count, n - least), 0))
            n -= removed[-1]
        return removed

    def _candidate(self, reducer, removed, dropped) -> Candidate | None:
        """Returns the candidate that removes these tokens; None if it is not valid."""
        dropped = [0] * len(removed) if dropped is None or not reducer.can_drop else dropped
        n, tokens = self._patches, []
        for count, drop in zip(removed, dropped, strict=True):
            least = max(reducer.min_kept(n - drop), self._patches // _LEAST)
            if count < 0 or not 0 <= drop <= count or n - count < least:
                return None
            n -= count
            tokens.append(n)
        blocks = [block for block, count in enumerate(removed) if count]
        plan = make_plan(self._patches, len(removed), tokens=[tokens[block] for block in blocks] or None, fuse=False,
                         drop=[dropped[block] for block in blocks], reduce_at=blocks, reducer=reducer)
        return Candidate(plan, tuple(removed), tuple(dropped))


class Journal:
    """The errors of evaluated plans. A file keeps them, so that a search which was stopped continues from them."""

    def __init__(self, path: str = '', key: str = ''):
        """Reads the file if it exists and belongs to the same search.

        Args:
          key: digest of model, images and settings; a file with another key is written anew.
        """
        self._path, self._errors = path, {}
        if not path:
            return
        try:
            with open(path, encoding='utf-8') as file:
                lines = [json.loads(line) for line in file if line.endswith('\n')]
            if lines and lines[0].get('search') == key:
                self._errors = {line['plan']: np.array(line['errors']) for line in lines[1:]}
                logging.info('%d evaluated plans are read from %s', len(self._errors), path)
                return
        except (OSError, ValueError, KeyError, AttributeError):
            pass
        self._write({'search': key}, 'w')

    def get(self, plan: str) -> np.ndarray | None:
        """Returns the errors of a plan, [B]; None if it was not evaluated."""
        return self._errors.get(plan)

    def add(self, plan: str, errors: np.ndarray) -> None:
        """Adds the errors of a plan."""
        self._errors[plan] = errors
        if self._path:
            self._write({'plan': plan, 'errors': errors.tolist()}, 'a')

    def _write(self, content, mode):
        with open(self._path, mode, encoding='utf-8') as file:
            file.write(json.dumps(content) + '\n')
