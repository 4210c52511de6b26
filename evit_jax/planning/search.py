"""Plan search: finds the plan that keeps the most tokens within a budget of time or MACs.

The search maximises the number of tokens that leave each block, summed over the blocks. This sum is a proxy for
accuracy. If two plans have the same sum, the cheaper one is preferred, then the one that reduces earlier.
"""

import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evit_jax.models.costs import block_macs
from evit_jax.reduction.plan import TokenPlan, make_plan

UNITS = {'x': 'times as fast as dense', 'img/s': 'images per second',
         'MACs': "fraction of the dense model's multiply-accumulates",
         'GMACs': '10^9 multiply-accumulates per image', 'MMACs': '10^6 multiply-accumulates per image'}
_MAX_STATES = 40_000  # maximum number of states for one choice of blocks; token counts are sampled to stay below it
_MIN_SLOPE = 3        # minimum slope of a step, as a multiple of the median slope
_MIN_RISE = 0.1       # smallest relative cost increase that counts as a step


class Target(NamedTuple):
    """A target for the speed or the MACs."""

    value: float
    unit: str  # a key of UNITS

    def __str__(self) -> str:
        return f'{self.value:g}{self.unit}'


class BlockCosts(NamedTuple):
    """Costs of a block. Each array [N + 1] is indexed by a number of tokens."""

    entering: np.ndarray   # cost of the attention, indexed by the tokens that enter the block
    leaving: np.ndarray    # cost of the MLP, indexed by the tokens that leave the block
    reduction: np.ndarray  # cost of the reduction, indexed by the tokens that enter the block

    @property
    def total(self) -> np.ndarray:
        """Costs of a block without a reduction."""
        return self.entering + self.leaving


class Costs(NamedTuple):
    """Costs of the parts of a model, all in the same unit. Arrays are indexed by token count with prefix tokens."""

    outside: float     # costs that do not depend on the plan
    block: BlockCosts  # costs of each block except the last one
    last: BlockCosts   # costs of the last block, including the heads on the patch tokens that leave it
    prefix: int = 1    # number of prefix tokens

    def total(self, plan: TokenPlan) -> float:
        """Returns the cost of the whole model under a plan."""
        costs = [self.block] * (len(plan.keep) - 1) + [self.last]
        return self.outside + float(sum(
            cost.entering[n_in + self.prefix] + cost.leaving[n_out + self.prefix]
            + (cost.reduction[n_in + self.prefix] if keep is not None else 0)
            for cost, n_in, n_out, keep in zip(costs, plan.entering, plan.counts, plan.keep, strict=True)))


def parse_target(text: str) -> Target:
    """Parses a target such as '2x', '20000img/s' or '3.0GMACs'.

    Raises:
      ValueError: the unit is unknown, or the number is not positive.
    """
    match = re.fullmatch(r'([\d.]+(?:e\d+)?) *(.*)', text.strip())
    units = ', '.join(f'{unit} ({meaning})' for unit, meaning in UNITS.items())
    if not match or match[2] not in UNITS:
        raise ValueError(f'--target={text} is not a number with one of the units {units}: give for example 2x')
    try:
        value = float(match[1])
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f'--target={text}: {match[1]} is not a number above 0')
    return Target(value, match[2])


def budget_for(target: Target, *, dense_seconds: float, dense_macs: int, batch: int) -> float:
    """Returns the budget for a target: seconds per batch, or MACs per image.

    Raises:
      ValueError: the dense model already reaches the target.
    """
    budget, dense, reached = {
        'x': (dense_seconds / target.value, dense_seconds, 1),
        'img/s': (batch / target.value, dense_seconds, batch / max(dense_seconds, 1e-30)),
        'MACs': (target.value * dense_macs, dense_macs, 1),
        'GMACs': (1e9 * target.value, dense_macs, dense_macs / 1e9),
        'MMACs': (1e6 * target.value, dense_macs, dense_macs / 1e6)}[target.unit]
    if budget > dense:
        raise ValueError(f'--target={target} is slower than the dense model, which has {reached:,.4g}{target.unit}: '
                         'nothing needs to be dropped for it')
    return budget


def mac_costs(dense_macs: int, *, patches: int, depth: int, width: int, mlp: int, prefix: int,
              head: int = 0) -> Costs:
    """Returns the MACs per image as costs. They are counted as in the papers.

    Args:
      mlp: MACs of the MLP of a block for one token.
      head: MACs of the heads for one patch token that leaves the last block.
    """
    counts = range(patches + prefix + 1)
    attention = np.array([block_macs(n, 0, width, mlp) for n in counts], float)
    leaving = np.array([block_macs(0, n, width, mlp) for n in counts], float)
    block = BlockCosts(attention, leaving, np.zeros(len(attention)))
    last = block._replace(leaving=leaving + head * (np.arange(len(leaving)) - prefix))
    return Costs(dense_macs - (depth - 1) * block.total[-1] - last.total[-1], block, last, prefix)


def steps(costs: Mapping[int, float]) -> list[tuple[int, int]]:
    """Returns the pairs of neighbouring counts between which the cost jumps, for example at the edge of a tile.

    Args:
      costs: token count -> cost.
    """
    counts = sorted(costs)
    pairs = list(itertools.pairwise(counts))
    slopes = [(costs[b] - costs[a]) / (b - a) for a, b in pairs]
    usual = statistics.median([slope for slope in slopes if slope > 0] or [0.0])
    return [(a, b) for (a, b), slope in zip(pairs, slopes)
            if slope > _MIN_SLOPE * usual and costs[b] - costs[a] > _MIN_RISE * costs[a]]


def interpolate(costs: Mapping[int, float], max_count: int) -> np.ndarray:
    """Interpolates costs linearly to every count from 0 to `max_count`, [max_count + 1].

    Counts within a step have the cost of its upper end. Counts below the lowest given one have its cost.
    """
    counts = sorted(costs)
    result = np.interp(np.arange(max_count + 1), counts, [costs[count] for count in counts])
    for a, b in steps(costs):
        result[a + 1:b] = costs[b]
    return result


def find_plan(costs: Costs, *, patches: int, depth: int, budget: float, blocks: Sequence[int], reductions: int = 3,
              least_rate: float = 0.5, fuse: bool = True) -> TokenPlan | None:
    """Returns the plan within a budget that keeps the most tokens, summed over the blocks; None if there is none.

    Keep rates do not rise from one reduction to the next, except by rounding up to a whole token. Constant keep rates
    have this property, so the search space contains all constant rates of at least `least_rate`. A fused token counts
    as a token.

    Args:
      budget: budget in the unit of the costs.
      blocks: blocks that may reduce tokens.
      reductions: maximum number of reductions.
      least_rate: minimum keep rate of each reduction. Without this limit, the best sum belongs to a single reduction
        that drops almost all tokens in an early block, where class attention is not informative yet.

    Raises:
      ValueError: a block is out of range.
    """
    blocks = sorted(set(blocks))
    make_plan(patches, depth, reduce_at=blocks)  # raises an error if a block is out of range
    dense = make_plan(patches, depth, reduce_at=())
    budget *= 1 + 1e-12
    if costs.total(dense) <= budget:
        return dense
    search = _Search(costs, patches, depth, budget, blocks, least_rate, fuse)
    best = max((result for count in range(1, reductions + 1) if (result := search.best(count))), default=None,
               key=lambda result: result[:2])
    return best and make_plan(patches, depth, tokens=best[3], reduce_at=best[2], fuse=fuse)


def cheapest_plan(costs: Costs, *, patches: int, depth: int, blocks: Sequence[int], reductions: int = 3,
                  least_rate: float = 0.5, fuse: bool = True) -> TokenPlan:
    """Returns the cheapest plan among those that reduce by `least_rate` at the first blocks."""
    first = sorted(set(blocks))[:reductions]
    plans = (make_plan(patches, depth, rate=least_rate, reduce_at=first[:count], fuse=fuse)
             for count in range(len(first) + 1))
    return min(plans, key=costs.total)


class _States(NamedTuple):
    """Partial plans that end after a reducing block. Element i of every array belongs to plan i."""

    tokens: np.ndarray     # number of tokens that leave the block
    limit: np.ndarray      # numerator of the largest keep rate allowed next
    entering: np.ndarray   # denominator of this keep rate
    cost: np.ndarray
    total: np.ndarray      # number of tokens that leave each block, summed over the blocks so far
    kept: tuple[np.ndarray, ...]  # number of tokens kept at each reduction


class _Search:
    """Exhaustive search over blocks and counts. A bisection determines the last count from the budget."""

    def __init__(self, costs, patches, depth, budget, blocks, least_rate, fuse):
        self._patches, self._depth, self._blocks, self._fuse = patches, depth, blocks, int(fuse)
        self._budget = budget - costs.outside
        self._min_kept = np.array([max(math.ceil(least_rate * n), 1) for n in range(patches + 1)])
        self._block, self._last_block = (
            BlockCosts(*(np.asarray(part)[costs.prefix:costs.prefix + patches + 1] for part in block))
            for block in (costs.block, costs.last))  # indexed without the prefix tokens from here on
        self._tails = {block: self._tail(block) for block in blocks}

    def best(self, reductions: int) -> tuple[int, float, tuple[int, ...], tuple[int, ...]] | None:
        """Returns the best plan with this number of reductions, as (token sum, negated cost, blocks, kept tokens)."""
        start = _States(*(np.array([value]) for value in (self._patches, 1, 1, 0.0, 0)), kept=())
        return self._search(start, (), reductions, self._candidates(reductions))

    def _search(self, states, at, left, candidates):
        best = None
        for block in self._blocks:
            if at and block <= at[-1]:
                continue
            entered, most = self._enter(states, block, block - 1 - at[-1] if at else block)
            result = (self._last(entered, most, (*at, block)) if left == 1 else
                      self._search(self._expand(entered, most, block, candidates), (*at, block), left - 1, candidates))
            if result and (best is None or result[:2] > best[:2]):
                best = result
        return best

    def _enter(self, states, block, between):
        """Returns the states before the next reduction, after `between` blocks, and the largest count it may keep."""
        n = states.tokens
        costs = self._costs_of(block)
        cost = states.cost + between * self._block.total[n] + costs.entering[n] + costs.reduction[n]
        most = np.minimum(-(-states.limit * n // states.entering), n - self._fuse - 1)
        return states._replace(cost=cost, total=states.total + between * n), most

    def _expand(self, states, most, block, candidates):
        """Returns the states after the reduction, for every allowed count that stays within the budget."""
        allowed = (candidates <= most[:, None]) & (candidates >= self._min_kept[states.tokens][:, None])
        source, index = np.nonzero(allowed)
        keep = candidates[index]
        tokens, cost = keep + self._fuse, states.cost[source] + self._costs_of(block).leaving[keep + self._fuse]
        affordable = cost + self._later_costs(block).min() <= self._budget
        source, keep, tokens, cost = source[affordable], keep[affordable], tokens[affordable], cost[affordable]
        return _States(tokens, keep, states.tokens[source], cost, states.total[source] + tokens,
                       (*(kept[source] for kept in states.kept), keep))

    def _last(self, states, most, at):
        """Returns the best plan that adds a last reduction to one of the states."""
        tail, rest = self._tails[at[-1]], self._budget - states.cost
        least, high = self._min_kept[states.tokens] + self._fuse, most + self._fuse
        low = least - 1
        limit = np.maximum(high, 0)
        while (low < high).any():  # finds the largest affordable count
            middle = (low + high + 1) // 2
            fits = (middle >= least) & (tail[limit, np.maximum(middle, 0)] <= rest)
            low, high = np.where((low < high) & fits, middle, low), np.where((low < high) & ~fits, middle - 1, high)
        if not (reached := np.flatnonzero(low >= least)).size:
            return None
        tokens = low[reached]
        total = states.total[reached] + (self._depth - at[-1]) * tokens
        cost = states.cost[reached] + tail[tokens, tokens]
        best = np.lexsort((cost, -total))[0]
        kept = (*(int(part[reached[best]]) for part in states.kept), int(tokens[best]) - self._fuse)
        return int(total[best]), -float(cost[best]), at, kept

    def _tail(self, block):
        """Returns a table [limit, n]: the minimum cost after the reduction of a block, over the counts n to limit."""
        cost = self._costs_of(block).leaving + self._later_costs(block)
        counts = np.arange(len(cost))
        table = np.where(counts <= counts[:, None], cost, np.inf)
        return np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]

    def _costs_of(self, block):
        return self._last_block if block == self._depth - 1 else self._block

    def _later_costs(self, block):
        """Returns the cost of all blocks after this one, indexed by the number of tokens in them."""
        between = self._depth - 2 - block
        return between * self._block.total + self._last_block.total if between >= 0 else 0 * self._last_block.total

    def _candidates(self, reductions):
        """Returns the counts to try at every reduction except the last one.

        These are all counts, or a sample if the search would take more than seconds.
        """
        free = max(reductions - 1, 1)
        number = int((_MAX_STATES * math.factorial(free)) ** (1 / free))
        if number >= self._patches:
            return np.arange(1, self._patches)
        edges = [low - self._fuse for low, _ in steps(dict(enumerate(self._block.total.tolist()))) if low > self._fuse]
        return np.unique(np.append(np.linspace(1, self._patches - 1, number).round().astype(int), edges)).astype(int)
