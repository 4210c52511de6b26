"""Token plans: how many tokens leave each block, decided in Python before anything is traced.

A plan is static. XLA compiles one program for each plan that is run, and the schedule, the cost model and
every program a person starts are ways of choosing a plan.
"""

from collections.abc import Sequence
from typing import NamedTuple

from evit_jax.tokens.reducers import EVIT, Reducer


class TokenPlan(NamedTuple):
    """Tokens kept at each block of one model; hashable, so it can be a static argument of `jax.jit`.

    Counts leave out the class (and distillation) token, which always stays.
    """

    patches: int                   # tokens that enter block 0
    keep: tuple[int | None, ...]   # per block: tokens kept by rank, None where nothing is dropped
    fused: bool                    # dropped tokens are blended into one, appended last
    reducer: Reducer = EVIT        # which tokens stay, and what becomes of the others

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens leaving each block; the fused token counts."""
        if self.reducer.masks:
            return (self.patches,) * len(self.keep)
        counts, n = [], self.patches
        for keep in self.keep:
            n = n if keep is None else keep + self.fused
            counts.append(n)
        return tuple(counts)

    @property
    def entering(self) -> tuple[int, ...]:
        """Tokens that come to each block."""
        return (self.patches, *self.counts[:-1])

    @property
    def attending(self) -> tuple[int, ...]:
        """Tokens in the attention of each block."""
        return self.counts if self.reducer.predicts else self.entering

    @property
    def reductions(self) -> tuple[int, ...]:
        """Blocks that drop tokens."""
        return tuple(block for block, keep in enumerate(self.keep) if keep is not None)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the patches, what each reduction keeps, or under a mask is to learn to keep."""
        return tuple(self.keep[block] / self.patches for block in self.reductions)

    def in_training(self) -> 'TokenPlan':
        """What trains a model for this plan: itself, where its reducer is trained as it is used."""
        return self._replace(reducer=self.reducer.training or self.reducer)

    def __str__(self) -> str:
        if not self.reductions:
            return f'{self.patches} tokens, nothing dropped'
        if self.reducer.masks:
            wanted = ' > '.join(str(self.keep[block]) for block in self.reductions)
            return f'{self.patches} tokens, {wanted} of them wanted at blocks {self.reductions}, {self.reducer}'
        counts = ' > '.join(str(self.counts[block]) for block in self.reductions)
        how = (', fused' if self.fused else '') + ('' if self.reducer == EVIT else f', {self.reducer}')
        return f'{self.patches} > {counts} tokens at blocks {self.reductions}{how}'


def make_plan(patches: int, depth: int, *, rate: float | Sequence[float] = 1.0, tokens: Sequence[int] | None = None,
              reduce_at: Sequence[int] = (3, 6, 9), fuse: bool = True, reducer: Reducer = EVIT) -> TokenPlan:
    """The plan of keep rates (or explicit token counts) at given blocks.

    EViT's reduction keeps `ceil(rate * n)` of the n tokens that enter it, a fused token among them; where that is
    all of them, nothing is dropped and nothing fused. Others may count in another way: `reducer.kept`. Predictors are
    counted by the reductions: with any that drops, all ask theirs.

    Args:
      patches: patch tokens of the image.
      depth: blocks of the model.
      rate: in (0, 1]; one for all reductions, or one for each.
      tokens: kept tokens at each reduction, in place of `rate`; a count that is not below n drops nothing.
      reduce_at: blocks (0-based) that reduce.
      fuse: blend the dropped tokens into one extra token, where the reducer can.

    Raises:
      ValueError: a rate, count or block out of range, or as many of them as there are no reductions.

    Source: EViT, section 3; youweiliang/evit, evit.py.
    """
    at, fuse = tuple(sorted(reduce_at)), fuse and reducer.fuses
    if len(set(at)) < len(at):
        raise ValueError(f'reduce_at={tuple(reduce_at)} names a block twice: give each block once')
    if outside := [block for block in at if not 0 <= block < depth]:
        raise ValueError(f'reduce_at={tuple(reduce_at)}: block {outside[0]} is outside 0..{depth - 1} of this model')
    if tokens:
        tokens = _one_each(tokens, at, 'tokens')
        if low := [count for count in tokens if count < 1]:
            raise ValueError(f'tokens={tokens}: {low[0]} tokens cannot be kept, the least is 1')
    else:
        rates = _one_each(rate if isinstance(rate, Sequence) else (rate,) * len(at), at, 'rate')
        if bad := [r for r in rates if not 0 < r <= 1]:
            raise ValueError(f'keep rate {bad[0]} is outside (0, 1]: 1 keeps every token, 0.7 keeps 70 %')
    keep, n = [], patches
    for block in range(depth):
        count = n
        if block in at:
            reduction = at.index(block)
            count = tokens[reduction] if tokens else reducer.kept(patches, n, rates[:reduction + 1])
        keep.append(count if count < n else None)
        n = count + fuse if count < n else n
    if reducer.predicts and any(keep):
        keep = _at_all(keep, patches, at)
    return TokenPlan(patches, tuple(keep), fuse, reducer)


def _at_all(keep, patches, at):
    """A reduction that drops nothing keeps what comes to it; without fusion."""
    found, n = [], patches
    for block, count in enumerate(keep):
        n = n if count is None else count
        found.append(n if block in at else None)
    return found


def _one_each(values, at, name):
    if len(values) != len(at):
        raise ValueError(f'{name}={tuple(values)} has {len(values)} values for {len(at)} reductions at blocks {at}')
    return tuple(values)


def block_macs(tokens_in: int, tokens_out: int, width: int, mlp_ratio: float) -> int:
    """Multiply-accumulates of one block on one image; a reduction stands between attention and MLP.

    Args:
      tokens_in: all tokens in the attention, class token included.
      tokens_out: all tokens that leave.
    """
    projections = 4 * tokens_in * width * width
    products = 2 * tokens_in * tokens_in * width
    mlp = 2 * tokens_out * width * int(width * mlp_ratio)
    return projections + products + mlp


def blocks_macs(plan: TokenPlan, *, width: int, mlp_ratio: float, prefix: int = 1) -> int:
    """Multiply-accumulates of all blocks on one image, attention products included.

    The class-attention row and the blend of a reduction (below 0.01 %) are left out, as in the paper's tables.

    Args:
      prefix: tokens beside the patches: class, distillation.
    """
    return sum(block_macs(n_in + prefix, n_out + prefix, width, mlp_ratio)
               for n_in, n_out in zip(plan.attending, plan.counts, strict=True))


def block_parameters(width: int, mlp_ratio: float, qkv_bias: bool = True) -> int:
    """Parameters of one block: two norms, attention, MLP."""
    hidden = int(width * mlp_ratio)
    attention = 4 * width * width + width + 3 * width * qkv_bias
    return 4 * width + attention + 2 * width * hidden + hidden + width
