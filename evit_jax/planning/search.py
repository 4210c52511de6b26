"""Finds the plan that keeps the most tokens within a budget, whatever it is a budget of.

What is maximised is the sum over the blocks of the tokens that leave each. That is a stand-in for accuracy, which no
table of costs knows. Among equals the cheaper plan wins, then the one whose reductions come first.
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

UNITS = {'x': 'times as fast as dense', 'img/s': 'images per second', 'GMACs': '10^9 multiply-accumulates of an image',
         'MMACs': '10^6 of them'}
_STATES = 40_000  # ways to make all reductions but the last at given blocks; coarser counts where there would be more
_CLIFF = 3        # how many times the median rise per token a rise is that nobody draws a line across
_RISE = 0.1       # and what share of the cost it is at least


class Target(NamedTuple):
    """What a person asks for."""

    value: float
    unit: str  # of UNITS

    def __str__(self) -> str:
        return f'{self.value:g}{self.unit}'


class BlockCosts(NamedTuple):
    """What a block costs; arrays [N + 1]."""

    entering: np.ndarray   # by the tokens that enter it: attention
    leaving: np.ndarray    # by those that leave it: MLP
    reduction: np.ndarray  # by those that enter it, where it drops some

    @property
    def whole(self) -> np.ndarray:
        """Where nothing is dropped."""
        return self.entering + self.leaving


class Costs(NamedTuple):
    """What the parts of a model cost, in one unit; arrays are by all tokens, prefix included."""

    outside: float     # what no count decides
    block: BlockCosts  # each but the last
    last: BlockCosts   # with the heads that read all that leaves it, if any does
    prefix: int = 1    # tokens beside the patches

    def of(self, plan: TokenPlan) -> float:
        """Of a whole model under a plan."""
        costs = [self.block] * (len(plan.keep) - 1) + [self.last]
        return self.outside + float(sum(
            cost.entering[n_in + self.prefix] + cost.leaving[n_out + self.prefix]
            + (cost.reduction[n_in + self.prefix] if keep is not None else 0)
            for cost, n_in, n_out, keep in zip(costs, plan.entering, plan.counts, plan.keep, strict=True)))


def read_target(text: str) -> Target:
    """A target as a person writes it: 2x, 20000img/s, 3.0GMACs.

    Raises:
      ValueError: it has no known unit, or is no positive number.
    """
    found = re.fullmatch(r'([\d.]+(?:e\d+)?) *(.*)', text.strip())
    known = ', '.join(f'{unit} ({meaning})' for unit, meaning in UNITS.items())
    if not found or found[2] not in UNITS:
        raise ValueError(f'--target={text} is no number with one of the units {known}: give one as 2x')
    try:
        value = float(found[1])
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f'--target={text}: {found[1]} is no number above 0')
    return Target(value, found[2])


def budget_of(target: Target, *, dense_seconds: float, dense_macs: int, batch: int) -> float:
    """Seconds of a batch, or multiply-accumulates of an image, that a plan may take for a target.

    Raises:
      ValueError: the dense model is there already.
    """
    budget, dense, reached = {
        'x': (dense_seconds / target.value, dense_seconds, 1),
        'img/s': (batch / target.value, dense_seconds, batch / dense_seconds),
        'GMACs': (1e9 * target.value, dense_macs, dense_macs / 1e9),
        'MMACs': (1e6 * target.value, dense_macs, dense_macs / 1e6)}[target.unit]
    if budget > dense:
        raise ValueError(f'--target={target} is slower than the dense model, which has {reached:,.4g}{target.unit}: '
                         'nothing needs to be dropped for it')
    return budget


def mac_costs(dense_macs: int, *, patches: int, depth: int, width: int, mlp_ratio: float, prefix: int,
              head: int = 0) -> Costs:
    """Multiply-accumulates of an image as the papers count them, as costs.

    Args:
      head: those of what reads every patch token that leaves the last block, for one token.
    """
    counts = range(patches + prefix + 1)
    attention = np.array([block_macs(n, 0, width, mlp_ratio) for n in counts], float)
    mlp = np.array([block_macs(0, n, width, mlp_ratio) for n in counts], float)
    block = BlockCosts(attention, mlp, np.zeros(len(attention)))
    last = block._replace(leaving=mlp + head * (np.arange(len(mlp)) - prefix))
    return Costs(dense_macs - (depth - 1) * block.whole[-1] - last.whole[-1], block, last, prefix)


def cliffs(known: Mapping[int, float]) -> list[tuple[int, int]]:
    """Neighbouring counts between which the cost leaps, as at the edge of a tile.

    Args:
      known: count -> cost.
    """
    counts = sorted(known)
    pairs = list(itertools.pairwise(counts))
    rises = [(known[b] - known[a]) / (b - a) for a, b in pairs]
    usual = statistics.median([rise for rise in rises if rise > 0] or [0.0])
    return [(a, b) for (a, b), rise in zip(pairs, rises)
            if rise > _CLIFF * usual and known[b] - known[a] > _RISE * known[a]]


def curve(known: Mapping[int, float], most: int) -> np.ndarray:
    """Costs of every count up to `most`, [most + 1]: on a line between neighbours, but never across a cliff.

    What lies on a cliff costs as much as its upper end; what lies below the least known count, as much as that.
    """
    counts = sorted(known)
    costs = np.interp(np.arange(most + 1), counts, [known[count] for count in counts])
    for a, b in cliffs(known):
        costs[a + 1:b] = known[b]
    return costs


def most_tokens(costs: Costs, *, patches: int, depth: int, budget: float, blocks: Sequence[int], reductions: int = 3,
                least_rate: float = 0.5, fuse: bool = True) -> TokenPlan | None:
    """The plan within the budget that keeps the most tokens, summed over the blocks that they leave.

    No reduction keeps a larger share of what enters it than the one before, but for rounding up to a whole token, as
    keep rates do: every plain keep rate from `least_rate` on is among the plans that are looked at. A fused token
    counts.

    Args:
      budget: in the unit of the costs.
      blocks: that may reduce.
      reductions: at most.
      least_rate: share of what enters it that every reduction keeps at least. Without such a limit the sum is largest
        where all is dropped at once, by the little that the first block knows.

    Returns:
      None, if nothing that is looked at is within the budget.

    Raises:
      ValueError: a block that the model does not have.
    """
    blocks = sorted(set(blocks))
    make_plan(patches, depth, reduce_at=blocks)  # refuses what is out of range
    dense = make_plan(patches, depth, reduce_at=())
    budget *= 1 + 1e-12
    if costs.of(dense) <= budget:
        return dense
    search = _Search(costs, patches, depth, budget, blocks, least_rate, fuse)
    best = max((found for count in range(1, reductions + 1) if (found := search.best(count))), default=None,
               key=lambda found: found[:2])
    return best and make_plan(patches, depth, tokens=best[3], reduce_at=best[2], fuse=fuse)


def cheapest(costs: Costs, *, patches: int, depth: int, blocks: Sequence[int], reductions: int = 3,
             least_rate: float = 0.5, fuse: bool = True) -> TokenPlan:
    """The plan of least cost that keeps as little as may be at the first of the blocks."""
    first = sorted(set(blocks))[:reductions]
    plans = (make_plan(patches, depth, rate=least_rate, reduce_at=first[:count], fuse=fuse)
             for count in range(len(first) + 1))
    return min(plans, key=costs.of)


class _States(NamedTuple):
    """Ways to come to the end of a block that reduces: arrays of one length."""

    tokens: np.ndarray     # that leave it
    limit: np.ndarray      # numerator and
    entering: np.ndarray   # denominator of the share that the next reduction may keep
    cost: np.ndarray
    total: np.ndarray      # tokens that left the blocks so far
    kept: tuple[np.ndarray, ...]  # at each reduction


class _Search:
    """Exhaustive over blocks and counts; the last count, which all else decides, is found by bisection."""

    def __init__(self, costs, patches, depth, budget, blocks, least_rate, fuse):
        self._patches, self._depth, self._blocks, self._fuse = patches, depth, blocks, int(fuse)
        self._budget = budget - costs.outside
        self._fewest = np.array([max(math.ceil(least_rate * n), 1) for n in range(patches + 1)])  # kept of n
        self._block, self._last_block = (
            BlockCosts(*(np.asarray(part)[costs.prefix:costs.prefix + patches + 1] for part in block))
            for block in (costs.block, costs.last))  # by patch tokens from here on
        self._tails = {block: self._tail(block) for block in blocks}

    def best(self, reductions: int) -> tuple[int, float, tuple[int, ...], tuple[int, ...]] | None:
        """Total tokens, minus the cost, blocks and kept tokens of the best plan with so many reductions."""
        start = _States(*(np.array([value]) for value in (self._patches, 1, 1, 0.0, 0)), kept=())
        return self._search(start, (), reductions, self._candidates(reductions))

    def _search(self, states, at, left, candidates):
        best = None
        for block in self._blocks:
            if at and block <= at[-1]:
                continue
            come, most = self._enter(states, block, block - 1 - at[-1] if at else block)
            found = (self._last(come, most, (*at, block)) if left == 1 else
                     self._search(self._expand(come, most, block, candidates), (*at, block), left - 1, candidates))
            if found and (best is None or found[:2] > best[:2]):
                best = found
        return best

    def _enter(self, states, block, between):
        """States in front of a reduction, after so many blocks that are whole, and the most that it may keep."""
        n = states.tokens
        costs = self._of(block)
        cost = states.cost + between * self._block.whole[n] + costs.entering[n] + costs.reduction[n]
        most = np.minimum(-(-states.limit * n // states.entering), n - self._fuse - 1)
        return states._replace(cost=cost, total=states.total + between * n), most

    def _expand(self, states, most, block, candidates):
        """Every state with every count that it may keep and pay for."""
        may = (candidates <= most[:, None]) & (candidates >= self._fewest[states.tokens][:, None])
        source, place = np.nonzero(may)
        keep = candidates[place]
        tokens, cost = keep + self._fuse, states.cost[source] + self._of(block).leaving[keep + self._fuse]
        payable = cost + self._behind(block).min() <= self._budget
        source, keep, tokens, cost = source[payable], keep[payable], tokens[payable], cost[payable]
        return _States(tokens, keep, states.tokens[source], cost, states.total[source] + tokens,
                       (*(kept[source] for kept in states.kept), keep))

    def _last(self, states, most, at):
        """The best way through the last reduction and the blocks behind it."""
        tail, rest = self._tails[at[-1]], self._budget - states.cost
        least, high = self._fewest[states.tokens] + self._fuse, most + self._fuse
        low = least - 1
        limit = np.maximum(high, 0)
        while (low < high).any():  # the largest count at which, or at one above it, the rest suffices
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
        """[limit, n]: the least that any count from n to the limit costs behind the reduction of a block."""
        cost = self._of(block).leaving + self._behind(block)
        counts = np.arange(len(cost))
        table = np.where(counts <= counts[:, None], cost, np.inf)
        return np.minimum.accumulate(table[:, ::-1], axis=1)[:, ::-1]

    def _of(self, block):
        return self._last_block if block == self._depth - 1 else self._block

    def _behind(self, block):
        """What all blocks behind one cost, by the tokens in them."""
        between = self._depth - 2 - block
        return between * self._block.whole + self._last_block.whole if between >= 0 else 0 * self._last_block.whole

    def _candidates(self, reductions):
        """Counts that a reduction with others behind it may keep: all, or so many that it does not take minutes."""
        free = max(reductions - 1, 1)
        number = int((_STATES * math.factorial(free)) ** (1 / free))
        if number >= self._patches:
            return np.arange(1, self._patches)
        edges = [low - self._fuse for low, _ in cliffs(dict(enumerate(self._block.whole.tolist()))) if low > self._fuse]
        return np.unique(np.append(np.linspace(1, self._patches - 1, number).round().astype(int), edges)).astype(int)
