"""Checks of the values of a token plan. The messages name the value, its limit and a way out."""

from collections.abc import Mapping, Sequence, Set
from typing import TypeVar

from evit_jax.reduction.reducer import Reducer

T = TypeVar('T')


def check_tokens(tokens: Sequence[float]) -> None:
    """Raises a ValueError unless all counts are whole numbers from 1."""
    if bad := [count for count in tokens if count % 1]:
        raise ValueError(f'tokens={tokens}: {bad[0]} is no whole number of tokens')
    if low := [count for count in tokens if count < 1]:
        raise ValueError(f'tokens={tokens}: {low[0]} tokens cannot be kept, the least is 1')


def drops_by_block(reduce_at: Sequence[int], drop: Sequence[int], counted: bool, reducer: Reducer) -> dict[int, int]:
    """Returns the number of dropped tokens by block; {} if none are given.

    Args:
      counted: True if the plan is given by token counts, False if by rates.

    Raises:
      ValueError: a number is negative or a fraction, there are no token counts, or the reducer cannot drop.
    """
    if not len(drop):
        return {}
    if not counted:
        raise ValueError(f'drop={tuple(drop)} without token counts: give tokens too, the number that each block keeps')
    for count in drop:
        if count % 1 or count < 0:
            raise ValueError(f'drop={tuple(drop)}: {count} is no number of tokens: give whole numbers from 0')
    if any(drop) and not reducer.can_drop:
        raise ValueError(f'drop={tuple(drop)}: reducer {reducer} does not drop tokens before it merges: leave drop '
                         'out, or give the reducer prune_merge')
    return dict(zip(sorted(reduce_at), map(int, by_depth(reduce_at, drop, 'drop')), strict=True))


def check_min_kept(count: int, entering: int, drop: int, block: int, reducer: Reducer) -> None:
    """Raises a ValueError if a block drops too many tokens, or keeps fewer than its reducer can."""
    if drop and drop > entering - count:
        raise ValueError(f'block {block}: drop={drop} leaves {entering - drop} of {entering} tokens, and {count} are '
                         f'to be kept: drop at most {max(entering - count, 0)}')
    if count < (min_kept := reducer.min_kept(entering - drop)):
        raise ValueError(
            f'block {block}: r={entering - count} of {entering} tokens cannot be merged by {reducer}, at most half of '
            f'them, {entering - min_kept}: keep {min_kept} or more there, or reduce in more blocks')


def check_merges(patches: int, depth: int, r: float | Sequence[int], decreasing: bool, reducer: Reducer) -> None:
    """Raises a ValueError if r is out of range or the reducer does not merge. For the arguments, see `merge_plan`."""
    one_each = isinstance(r, Sequence)
    text = '-'.join(map(str, r)) if one_each else f'{r:g}'
    if (any(r) if one_each else r) and not reducer.merges:
        raise ValueError(f'r={text} is a count of merged tokens, and {reducer} merges none: give a keep rate, or r=0')
    if one_each:
        _check_merges_of_blocks(patches, depth, r, decreasing, reducer, text)
        return
    most = (2 if decreasing and depth > 1 else 1) * r
    if not 0 <= most <= patches // 2:
        raise ValueError(f'r={r:g} would merge {most:g} of {patches} tokens in the first block: a block merges at most '
                         f'half of them, so give 0 <= r <= {patches // 2 / (most / r) if r > 0 else patches // 2:g}')


def _check_merges_of_blocks(patches, depth, r, decreasing, reducer, text):
    if decreasing:
        raise ValueError(f'r={text} has a number for each block, and decreasing=True is for one number: leave one out')
    if len(r) != depth:
        raise ValueError(f'r={text} has {len(r)} numbers for {depth} blocks: give one for each block, 0 merges none')
    n = patches
    for block, count in enumerate(r):
        if count % 1 or count < 0:
            raise ValueError(f'r={text}: {count} is no number of tokens: give whole numbers from 0')
        if count > (most := n - reducer.min_kept(n)):
            raise ValueError(f'r={text}: block {block} would merge {count} of its {n} tokens, and {reducer} merges at '
                             f'most {most} of them: give {most} or less there, or merge fewer in earlier blocks')
        n -= count


def by_depth(reduce_at: Sequence[int], values: Sequence[T], name: str) -> tuple[T, ...]:
    """Sorts the values of blocks by block index.

    Args:
      reduce_at: blocks, in any order.
      values: one value for each block, in the order of `reduce_at`.
      name: name of the values, for the message.

    Raises:
      ValueError: the numbers of values and blocks differ, or one of them is a set, which has no order, or a dict.
    """
    for given, sequence in ((name, values), ('reduce_at', reduce_at)):
        if isinstance(sequence, Set | Mapping):
            kind = 'set, which has no order' if isinstance(sequence, Set) else 'dict'
            raise ValueError(f'{given}={sequence} is a {kind}, and {name} has a value for each block: give both as '
                             'tuples of one order')
    if len(values) != len(reduce_at):
        raise ValueError(f'{name}={tuple(values)} has {len(values)} values for {len(reduce_at)} reductions at blocks '
                         f'{tuple(reduce_at)}')
    pairs = zip(reduce_at, values, strict=True)
    return tuple(value for _, value in sorted(pairs, key=lambda pair: pair[0]))


def check_blocks(reduce_at: Sequence[int], depth: int) -> None:
    """Raises a ValueError unless the blocks are distinct whole numbers in [0, depth)."""
    if isinstance(reduce_at, Mapping):
        raise ValueError(f'reduce_at={reduce_at} is a dict: give the blocks as a tuple')
    if fractional := [block for block in reduce_at if block % 1]:
        raise ValueError(f'reduce_at={tuple(reduce_at)}: {fractional[0]} is no whole number: give blocks in '
                         f'0..{depth - 1}')
    if len(set(reduce_at)) < len(reduce_at):
        raise ValueError(f'reduce_at={tuple(reduce_at)} names a block twice: give each block once')
    if outside := [block for block in reduce_at if not 0 <= block < depth]:
        raise ValueError(f'reduce_at={tuple(reduce_at)}: block {outside[0]} is outside 0..{depth - 1} of this model')
