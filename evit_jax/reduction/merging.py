"""Tokens merged into weighted means: the most alike of them (ToMe), or runs of neighbours. Shapes are static."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evit_jax.reduction.tokens import Tokens, remap


def fewest_of_matching(tokens: int) -> int:
    """Tokens that a matching leaves at least: half of them can go into the other half."""
    return tokens - tokens // 2


def merge_matched(tokens: Tokens, keys: Array, keep: int) -> Tokens:
    """Merges tokens of one half into those of the other half that they are most alike to.

    Every second token, by its place among all with those in front, is in set A, the first among them; the others
    are in set B. Each token of A points at the one of B whose key has the largest cosine with its own, and of these
    pairs the most alike are merged, by the mean of all patches in them. Class and distillation token have part in the
    places alone.

    Args:
      keys: [B, N, d] float32.
      keep: static; every new value compiles a new program.

    Returns:
      keep tokens: of A what was not merged, in order, then B. A merged token has the patch id of that of B.

    Raises:
      ValueError: `keep` is not in [N - N // 2, N].

    Source: ToMe, arXiv 2210.09461, section 3; facebookresearch/ToMe, `bipartite_soft_matching`.
    """
    n = keys.shape[1]
    if not fewest_of_matching(n) <= keep <= n:
        raise ValueError(f'r={n - keep} of {n} tokens cannot be merged: r is at most {n // 2}, half of them, as each '
                         'goes into one of the other half')
    if keep == n:
        return tokens
    first, r = tokens.num_prefix_tokens % 2, n - keep  # place of the first patch of A
    keys = keys * jax.lax.rsqrt(jnp.maximum(jnp.square(keys).sum(-1, keepdims=True), 1e-24))
    alike = jnp.einsum('bid,bjd->bij', keys[:, first::2], keys[:, 1 - first::2], precision='highest')  # [B, A, B]
    into = alike.argmax(-1).astype(jnp.int32)  # [B, A]
    best_first = jnp.argsort(alike.max(-1), axis=1, descending=True)
    gone, left = best_first[:, :r], jnp.sort(best_first[:, r:], axis=1)
    goes_into = jnp.take_along_axis(into, gone, axis=1)

    size, (in_front, x) = _sizes(tokens), jnp.split(tokens.x, [tokens.num_prefix_tokens], axis=1)
    total, sizes = _added(x[:, first::2], x[:, 1 - first::2], size[:, first::2], size[:, 1 - first::2], gone, goes_into)
    x = jnp.concatenate([in_front, _at(x[:, first::2], left), (total / sizes[..., None]).astype(x.dtype)], axis=1)
    mask = jax.vmap(lambda gone: jnp.ones(into.shape[1], jnp.int32).at[gone].set(0))(gone)
    place = jnp.empty(keys.shape[:2], jnp.int32)
    place = place.at[:, first::2].set(jnp.where(mask, mask.cumsum(1) - 1, into + left.shape[1]))
    place = place.at[:, 1 - first::2].set(left.shape[1] + jnp.arange(alike.shape[2], dtype=jnp.int32))
    return Tokens(
        x, patch=jnp.concatenate([_at(tokens.patch[:, first::2], left), tokens.patch[:, 1 - first::2]], axis=1),
        token_of_patch=remap(tokens.token_of_patch, place),
        size=None if tokens.size is None else jnp.concatenate([_at(size[:, first::2], left), sizes], axis=1))


def merge_runs(tokens: Tokens, keep: int) -> Tokens:
    """Merges runs of neighbours: of n tokens number i goes to run i * keep // n. Nothing is looked at.

    Returns:
      keep tokens, each the mean of all patches in its run, with the id of the run's first.

    Raises:
      ValueError: `keep` is outside [1, N].
    """
    n = tokens.patch.shape[1]
    if not 1 <= keep <= n:
        raise ValueError(f'keep={keep} is outside [1, {n}]')
    run = np.arange(n) * keep // n
    first = np.searchsorted(run, np.arange(keep))
    place = first[:, None] + np.arange(np.bincount(run).max())  # [keep, longest run]
    inside = run[np.minimum(place, n - 1)] == np.arange(keep)[:, None]
    members, inside = np.minimum(place, n - 1), inside & (place < n)
    weight = _sizes(tokens)[:, members] * inside  # [B, keep, longest run]
    sizes = weight.sum(-1)
    in_front, x = jnp.split(tokens.x, [tokens.num_prefix_tokens], axis=1)
    total = jnp.einsum('bkm,bkmd->bkd', weight, x[:, members], preferred_element_type=jnp.float32)
    return Tokens(
        jnp.concatenate([in_front, (total / sizes[..., None]).astype(x.dtype)], axis=1), tokens.patch[:, first],
        remap(tokens.token_of_patch, jnp.broadcast_to(jnp.asarray(run, jnp.int32), tokens.patch.shape)),
        None if tokens.size is None else sizes)


def _sizes(tokens: Tokens) -> Array:
    """Patches in each token, [B, N] float32; where nobody counts them, by the patches that are at home there."""
    if tokens.size is not None:
        return tokens.size
    if tokens.token_of_patch is None:
        return jnp.ones(tokens.patch.shape, jnp.float32)
    n = tokens.patch.shape[1]

    def count(token_of_patch):
        return jnp.zeros(n + 1, jnp.float32).at[jnp.where(token_of_patch < 0, n, token_of_patch)].add(1)[:n]

    return jax.vmap(count)(tokens.token_of_patch)


def _added(x_a, x_b, size_a, size_b, gone, goes_into):
    """Sums of the tokens of B and what goes into them, each by its size, [B, N, D] float32; and their sizes."""
    arrives = jax.nn.one_hot(goes_into, size_b.shape[1], dtype=jnp.float32)  # [B, r, N]
    weight = arrives * jnp.take_along_axis(size_a, gone, axis=1)[..., None]
    # A product in place of a scatter, which is slow where matrices are fast.
    arrived = jnp.einsum('brn,brd->bnd', weight, _at(x_a, gone).astype(jnp.float32), precision='highest')
    return size_b[..., None] * x_b + arrived, size_b + weight.sum(1)


def _at(rows, places):
    """Rows of [B, N] or [B, N, D] at places [B, K]."""
    return jnp.take_along_axis(rows, places if rows.ndim == 2 else places[..., None], axis=1)
