"""Token plans: the number of tokens that leave each block, decided in Python before tracing.

A plan is static: XLA compiles one program for each plan.
"""

import functools
from collections.abc import Callable, Mapping, Sequence, Set
from typing import NamedTuple

from absl import logging

from evit_jax.reduction.plan_checks import (
    by_depth,
    check_blocks,
    check_merges,
    check_min_kept,
    check_tokens,
    drops_by_block,
)
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.reducers import EVIT, TOME

_TOLERANCE = 0.01  # accepted relative error of the MACs


class TokenPlan(NamedTuple):
    """The number of tokens kept at each block of a model. It is hashable, for use as a static argument of `jax.jit`.

    All counts are numbers of patch tokens. Prefix tokens (class, distillation) are always kept and not counted.
    """

    patches: int                   # number of tokens that enter block 0
    keep: tuple[int | None, ...]   # number of tokens kept at each block; None: the block does not reduce
    fused: bool                    # the dropped tokens are fused into one, appended last
    reducer: Reducer = EVIT        # decides which tokens are kept, dropped or merged
    drop: tuple[int, ...] = ()     # number of tokens dropped at each block before the others merge; (): none anywhere

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of tokens that leave each block, including a fused token."""
        counts, n = [], self.patches
        for keep in self.keep:
            n = n if keep is None else self.reducer.num_leaving(n, keep, self.fused)
            counts.append(n)
        return tuple(counts)

    @property
    def entering(self) -> tuple[int, ...]:
        """Number of tokens that enter each block."""
        return (self.patches, *self.counts[:-1])

    @property
    def attending(self) -> tuple[int, ...]:
        """Number of tokens in the attention of each block."""
        return self.counts if self.reducer.before_block else self.entering

    @property
    def reductions(self) -> tuple[int, ...]:
        """Indices of the blocks that reduce tokens."""
        return tuple(block for block, keep in enumerate(self.keep) if keep is not None)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Number of tokens kept at each reduction."""
        return tuple(self.keep[block] for block in self.reductions)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Number of tokens dropped at each reduction before the others merge; () if none are dropped anywhere."""
        return tuple(self.drop[block] for block in self.reductions) if any(self.drop) else ()

    @property
    def kept_fractions(self) -> tuple[float, ...]:
        """Fraction of all patches that each reduction keeps."""
        return tuple(count / self.patches for count in self.tokens)

    @property
    def masks_tokens(self) -> bool:
        """True if the reducer masks tokens instead of dropping them, so that no count changes."""
        return any(self.counts[block] != self.keep[block] + self.fused for block in self.reductions)

    def in_training(self) -> 'TokenPlan':
        """Returns this plan with the training variant of its reducer.

        Most reducers train as they are. DynamicViT masks tokens instead of dropping them.
        """
        return self._replace(reducer=self.reducer.in_training())

    def __str__(self) -> str:
        if not self.reductions:
            return f'{self.patches} tokens, nothing dropped'
        if self.masks_tokens:
            kept = ' > '.join(map(str, self.tokens))
            return f'{self.patches} tokens, {kept} of them unmasked at blocks {self.reductions}, {self.reducer}'
        counts = ' > '.join(str(self.counts[block]) for block in self.reductions)
        how = (', fused' if self.fused else '') + ('' if self.reducer == EVIT else f', {self.reducer}')
        how += f', dropping {" > ".join(map(str, self.dropped))} before the merges' if self.dropped else ''
        return f'{self.patches} > {counts} tokens at blocks {self.reductions}{how}'


def make_plan(patches: int, depth: int, *, rate: float | Sequence[float] = 1.0, tokens: Sequence[int] | None = None,
              drop: Sequence[int] = (), reduce_at: Sequence[int] = (3, 6, 9), fuse: bool = True,
              reducer: Reducer = EVIT) -> TokenPlan:
    """Returns the plan for keep rates, or for token counts, at given blocks.

    EViT keeps `ceil(rate * n)` of the n tokens that enter a reduction; n includes the fused token of an earlier one. If
    this is n, the block does not reduce. Other reducers may count differently; see `Reducer.num_kept`. A reducer with
    learned modules is an exception: if any of its reductions drops tokens, the plan contains all reductions, so that
    each keeps its module.

    Args:
      patches: number of patch tokens of the image.
      depth: number of blocks of the model.
      rate: keep rate in (0, 1]: a number for all reductions, or a sequence with one for each block of `reduce_at`, in
        its order.
      tokens: number of tokens kept at each block of `reduce_at`, in its order; replaces `rate`. A count of n or more
        drops nothing; a count above n logs a warning.
      drop: number of tokens dropped at each block of `reduce_at`, in its order, before the others are merged. It needs
        `tokens`, and a reducer that does both (`Reducer.can_drop`).
      reduce_at: indices of the blocks that reduce, from 0, in any order.
      fuse: fuse the dropped tokens into one extra token if the reducer can.

    Raises:
      ValueError: a rate, count or block is out of range, the number of values differs from the number of blocks, or
        the values are a set or a dict.

    Source: EViT, section 3; youweiliang/evit, evit.py.
    """
    fuse, counted = fuse and reducer.can_fuse, tokens is not None and len(tokens) > 0
    check_blocks(reduce_at, depth)
    drops = drops_by_block(reduce_at, drop, counted, reducer)
    if counted:
        check_tokens(tokens := by_depth(reduce_at, tokens, 'tokens'))
    else:
        one_each = isinstance(rate, Sequence | Set | Mapping) or getattr(rate, 'ndim', 0)  # an array is no Sequence
        rates = by_depth(reduce_at, rate, 'rate') if one_each else (rate,) * len(reduce_at)
        if bad := [r for r in rates if not 0 < r <= 1]:
            raise ValueError(f'keep rate {bad[0]} is outside (0, 1]: 1 keeps every token, 0.7 keeps 70 %')
    blocks, keep, n = tuple(sorted(reduce_at)), [], patches
    for block in range(depth):
        count = n
        if block in blocks:
            reduction = blocks.index(block)
            count = int(tokens[reduction]) if counted else reducer.num_kept(patches, n, rates[:reduction + 1])
            check_min_kept(count, n, drops.get(block, 0), block, reducer)
            if count > n:
                logging.warning('tokens=%s: block %d keeps all of its %d tokens, because fewer than %d enter it',
                                tokens, block, n, count)
        keep.append(count if count < n else None)
        n = count + fuse if count < n else n
    if reducer.is_learned and any(keep):
        keep = _reduce_at_all(keep, patches, blocks)
    drop = tuple(drops.get(block, 0) for block in range(depth)) if any(drops.values()) else ()
    return TokenPlan(patches, tuple(keep), fuse, reducer, drop)


def merge_plan(patches: int, depth: int, *, r: float | Sequence[int], decreasing: bool = False, progress: float = 1.0,
               reducer: Reducer = TOME) -> TokenPlan:
    """Returns the plan that merges r tokens in every block (ToMe). A block with fewer than 2 r tokens merges half.

    Args:
      patches: number of patch tokens of the image.
      depth: number of blocks of the model.
      r: number of tokens merged in each block, or a sequence with one number for each block. A fraction is met on
        average: 0.5 merges 1 token in every second block.
      decreasing: the number falls linearly from 2 r in the first block to 0 in the last; the total is the same. (ToMe's
        code rounds down in each block, so it merges slightly fewer tokens.) Only for one number.
      progress: fraction of r that is merged, in [0, 1]; set by the keep-rate schedule.

    Raises:
      ValueError: the reducer does not merge, a number is more than half of the tokens, or the sequence has not one
        number for each block.

    Source: ToMe, arXiv 2210.09461, sections 3 and 4.1.
    """
    check_merges(patches, depth, r, decreasing, reducer)
    counts = r if isinstance(r, Sequence) else (r,) * depth
    if decreasing and depth > 1:
        counts = tuple(2 * r * (1 - block / (depth - 1)) for block in range(depth))
    keep, n, target, merged = [], patches, 0.0, 0
    for count in counts:
        target += progress * count
        left = max(n - (round(target) - merged), reducer.min_kept(n))
        keep.append(left if left < n else None)
        n, merged = left, round(target)
    return TokenPlan(patches, tuple(keep), False, reducer)


def plan_of_macs(macs: Callable[[TokenPlan], int], fraction: float,
                 plan_at: Callable[[float], TokenPlan]) -> TokenPlan:
    """Returns the plan whose multiply-accumulates (MACs) are nearest to a fraction of the dense MACs.

    Args:
      macs: plan -> MACs, such as `ViTConfig.macs`.
      fraction: fraction of the dense MACs, in (0, 1].
      plan_at: number in [0, 1] -> plan. 0 gives the dense plan; larger numbers give fewer MACs. See `plans_of`.

    Raises:
      ValueError: the fraction is out of range, or `plan_at(1)` has more MACs.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f'{fraction:g} of the MACs is outside (0, 1]: 1 is dense')
    if fraction == 1:
        return plan_at(0)
    target = fraction * macs(plan_at(0))
    if (least := macs(plan_at(1))) > target * (1 + _TOLERANCE):
        raise ValueError(f'{plan_at(1)} has {least / macs(plan_at(0)):.3f} of the MACs, and fewer cannot be reached: '
                         f'ask for more than {fraction:g}, or reduce in more or earlier blocks')
    low, high = 0.0, 1.0
    for _ in range(40):  # enough to separate neighbouring plans
        middle = (low + high) / 2
        low, high = (middle, high) if macs(plan_at(middle)) > target else (low, middle)
    return min(plan_at(low), plan_at(high), key=lambda plan: abs(macs(plan) - target))


def plans_of(reducer: Reducer, patches: int, depth: int, *, reduce_at: Sequence[int] = (3, 6, 9), fuse: bool = True,
             decreasing: bool = False) -> Callable[[float], TokenPlan]:
    """Returns a function from a number in [0, 1] to a plan, for `plan_of_macs`. The number 0 gives the dense plan.

    A larger number lowers the keep rate, which all given blocks share; 1 gives the lowest rate that the reducer allows.
    For a reducer with `every_block`, it raises the number of tokens merged in every block; 1 merges half of the patches
    in the first block.
    """
    if reducer.every_block:
        most = patches // 2 / (2 if decreasing and depth > 1 else 1)
        return lambda amount: merge_plan(patches, depth, r=most * amount, decreasing=decreasing, reducer=reducer)
    make = functools.partial(make_plan, patches, depth, reduce_at=reduce_at, fuse=fuse, reducer=reducer)
    least = reducer.min_kept(patches) / patches
    return lambda amount: make(rate=1 - (1 - least) * amount)


def _reduce_at_all(keep, patches, blocks):
    """Adds the reductions that keep all tokens: each of them has a learned module. They do not fuse."""
    result, n = [], patches
    for block, count in enumerate(keep):
        n = n if count is None else count
        result.append(n if block in blocks else None)
    return result
