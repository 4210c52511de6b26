"""Merges tokens: into means over the patches of groups, pairs (ToMe) or runs of neighbours, or into weighted sums.

Shapes are static.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evit_jax.reduction.tokens import Tokens, remap


def merge_into(tokens: Tokens, kept: Array, merged: Array, target: Array, *, keep_norm: bool = False) -> Tokens:
    """Merges tokens into kept tokens. Each becomes the mean over all patches in it. The other tokens are dropped.

    Args:
      kept: [B, K] int32, indices of the kept tokens.
      merged: [B, M] int32, indices of the merged tokens.
      target: [B, M] int32, index in `kept` of the token that each of them is merged into; -1: it is dropped.
      keep_norm: scale each mean to the mean norm of its patches. A mean of different vectors is shorter than they are.

    Returns:
      K tokens in the order of `kept`, with the patch ids of the kept tokens.
    """
    keep, size, x = kept.shape[1], tokens.sizes, tokens.patches.astype(jnp.float32)
    if keep_norm:  # the last column becomes the mean norm
        x = jnp.concatenate([x, _norm(x)], axis=-1)
    # Use a product: a scatter is slow on devices with matrix units. The row of a dropped token is 0.
    weight = jax.nn.one_hot(target, keep, dtype=jnp.float32) * _rows(size, merged)[..., None]
    added = jnp.einsum('brk,brd->bkd', weight, _rows(x, merged), precision='highest')
    sizes = _rows(size, kept)
    total, sizes = sizes[..., None] * _rows(x, kept) + added, sizes + weight.sum(1)
    mean = total / sizes[..., None]
    if keep_norm:
        mean, norm = mean[..., :-1], mean[..., -1:]
        mean = mean * norm / _norm(mean)

    def new_index(kept, merged, target):
        return jnp.full(size.shape[1], -1).at[kept].set(jnp.arange(keep)).at[merged].set(target)

    return tokens.replace(
        x=jnp.concatenate([tokens.prefix, mean.astype(tokens.x.dtype)], axis=1),
        patch_ids=_rows(tokens.patch_ids, kept), size=None if tokens.size is None else sizes, scores=None,
        token_of_patch=remap(tokens.token_of_patch, jax.vmap(new_index)(kept, merged, target)))


def merge_groups(tokens: Tokens, group: Array, centres: Array) -> Tokens:
    """Merges each group of tokens into the mean over all patches in the group. Tokens without a group are dropped.

    Args:
      group: [B, N] int32, index of the group of each token, in [0, K); -1: the token is dropped.
      centres: [B, K] int32, index of one token of each group. The group takes its patch id.

    Returns:
      K tokens in the order of the groups.
    """
    n, keep = group.shape[1], centres.shape[1]
    is_centre = jax.vmap(lambda index: jnp.zeros(n, jnp.int32).at[index].set(1))(centres)
    others = jnp.argsort(is_centre, axis=1)[:, :n - keep]
    return merge_into(tokens, centres, others, _rows(group, others))


def merge_matched(tokens: Tokens, keys: Array, keep: int) -> Tokens:
    """Merges tokens of one half into the most similar tokens of the other half (bipartite soft matching).

    Set A contains the tokens at even positions, set B those at odd positions; positions include the prefix tokens, but
    prefix tokens are not merged. Each token of A is paired with the token of B that has the most similar key (cosine
    similarity). The most similar pairs are merged: a merged token is the mean over all patches in the pair.

    Args:
      keys: [B, N, d] float32.
      keep: static; each value compiles its own program.

    Returns:
      `keep` tokens: the unmerged tokens of A in order, then the tokens of B. A merged token has the patch id of its
      member in B.

    Raises:
      ValueError: `keep` is not in [N - N // 2, N].

    Source: ToMe, arXiv 2210.09461, section 3; facebookresearch/ToMe, `bipartite_soft_matching`.
    """
    if keep == keys.shape[1]:
        return tokens
    return merge_into(tokens, *match_pairs(keys, keep, tokens.num_prefix_tokens))


def match_pairs(keys: Array, keep: int, num_prefix_tokens: int) -> tuple[Array, Array, Array]:
    """Returns the arguments `kept`, `merged` and `target` of `merge_into` for the pairs of `merge_matched`.

    Raises:
      ValueError: `keep` is not in [N - N // 2, N].
    """
    n = keys.shape[1]
    if not n - n // 2 <= keep <= n:
        raise ValueError(f'r={n - keep} of {n} tokens cannot be merged: r is at most {n // 2}, half of them, as each '
                         'goes into one of the other half')
    first, r = num_prefix_tokens % 2, n - keep  # index of the first patch token in A
    keys = keys * jax.lax.rsqrt(jnp.maximum(jnp.square(keys).sum(-1, keepdims=True), 1e-24))
    similarity = jnp.einsum('bid,bjd->bij', keys[:, first::2], keys[:, 1 - first::2], precision='highest')  # [B, A, B]
    order = jnp.argsort(similarity.max(-1), axis=1, descending=True)
    merged, unmerged = order[:, :r], jnp.sort(order[:, r:], axis=1)
    b = jnp.broadcast_to(jnp.arange(1 - first, n, 2), similarity[:, 0].shape)
    target = _rows(similarity.argmax(-1), merged) + unmerged.shape[1]
    return jnp.concatenate([first + 2 * unmerged, b], axis=1), first + 2 * merged, target


def merge_runs(tokens: Tokens, keep: int) -> Tokens:
    """Merges runs of neighbours: token i of n belongs to run i * keep // n, whatever its content.

    Returns:
      `keep` tokens, each the mean over all patches in its run, with the patch id of the first token of the run.

    Raises:
      ValueError: `keep` is outside [1, N].
    """
    n = tokens.patch_ids.shape[1]
    if not 1 <= keep <= n:
        raise ValueError(f'keep={keep} is outside [1, {n}]')
    run = np.arange(n) * keep // n
    group, first = (jnp.broadcast_to(jnp.asarray(row, jnp.int32), (tokens.x.shape[0], len(row)))
                    for row in (run, np.searchsorted(run, np.arange(keep))))
    return merge_groups(tokens, group, first)


def merge_soft(tokens: Tokens, weights: Array, x: Array) -> Tokens:
    """Replaces the tokens by K weighted sums over all of them (soft assignment).

    Each token is also assigned to one sum, for the records: to the one with its largest weight. A sum that is the first
    choice of no token takes one of the tokens that represent no other sum, in order. The record does not change the
    activations.

    Args:
      weights: [B, K, N] float32, weight of each token in each sum.
      x: [B, N, D], summands.

    Returns:
      K tokens. The patch id of a sum is that of the token with the largest weight among those assigned to it.
    """
    keep, n = weights.shape[1:]
    index = jnp.arange(keep, dtype=jnp.int32)
    group = weights.argmax(1).astype(jnp.int32)  # [B, N]
    inside = group[:, None] == index[:, None]  # [B, K, N]
    best, is_empty = jnp.where(inside, weights, -jnp.inf).argmax(-1), ~inside.any(-1)
    is_taken = jax.vmap(lambda best, empty: jnp.zeros(n, jnp.int32).at[jnp.where(empty, n, best)].set(1, mode='drop'))(
        best, is_empty)
    free = jnp.argsort(is_taken, axis=1)  # the free tokens first, in order
    rank = jnp.minimum(is_empty.cumsum(-1) - 1, n - 1)  # number of empty sums before each empty sum
    centres = jnp.where(is_empty, _rows(free, jnp.maximum(rank, 0)), best).astype(jnp.int32)
    group = jax.vmap(lambda group, centres: group.at[centres].set(index))(group, centres)
    sums = jnp.einsum('bkn,bnd->bkd', weights, x.astype(jnp.float32), precision='highest')
    return tokens.replace(
        x=jnp.concatenate([tokens.prefix, sums.astype(tokens.x.dtype)], axis=1), scores=None,
        patch_ids=_rows(tokens.patch_ids, centres), token_of_patch=remap(tokens.token_of_patch, group))


def _norm(x):
    """Returns the L2 norm of the last axis, kept with length 1. The gradient at 0 is finite."""
    return jnp.sqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-24))


def _rows(array, index):
    """Returns the rows of [B, N] or [B, N, D] at indices [B, K]."""
    return jnp.take_along_axis(array, index if array.ndim == 2 else index[..., None], axis=1)
