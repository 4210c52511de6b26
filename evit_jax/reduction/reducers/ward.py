"""Ward merges each token into a more important one, where the activations lose the least variance.

The rule is this project's own, for models that are not trained again; docs/training_free.md has the measurements.
Source of the criterion: Ward, "Hierarchical Grouping to Optimize an Objective Function", JASA 58, 1963.
"""

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.reduction.gather import top_k
from evit_jax.reduction.merging import merge_into
from evit_jax.reduction.registry import register_reducer
from evit_jax.reduction.tokens import Tokens


@register_reducer('ward', merges=True, every_block=True, same_in_all_blocks=True, importance='')
def WARD(tokens, inputs, keep):
    """Merges N - keep tokens, each into the more important token that is the cheapest to join.

    Cost of a join of i and j: |x_i - x_j|² s_i s_j / (s_i + s_j), with the activations x and the numbers of patches s.
    It is the increase of the sum of squared distances between patches and their tokens (Ward).
    Joins: each token may join one token with higher importance. The N - keep cheapest joins are made. If the other
    token joins a third, all of them become one token.
    Merged token: the mean over its patches, scaled to the mean of their norms.

    A call costs N² D multiply-accumulates for the distances and r (N - r) D for the means, with r = N - keep (14.9 M
    and 1.1 M for N = 197, D = 384, r = 16; a block of DeiT-S has 378 M).
    """
    return join_cheapest(tokens, inputs.importance, keep)


def join_cheapest(tokens: Tokens, importance: Array, keep: int, *, drop: int = 0) -> Tokens:
    """Drops the least important tokens, then merges others as `WARD` describes.

    Args:
      importance: [B, N]; only its order matters. Of equal tokens, the later is more important.
      keep: number of tokens that leave; static.
      drop: number of dropped tokens, at most N - keep; static.

    Returns:
      `keep` tokens in their old order.
    """
    n = importance.shape[1]
    if keep == n:
        return tokens
    index = jnp.arange(n, dtype=jnp.int32)
    more = (importance[:, None] > importance[:, :, None]) | (
        (importance[:, None] == importance[:, :, None]) & (index > index[:, None]))  # [i, j]: j is more important
    cost = jnp.where(more, _join_costs(tokens.patches, tokens.sizes), jnp.inf)
    leader, least = cost.argmin(-1).astype(jnp.int32), cost.min(-1)
    is_dropped = more.sum(-1) >= n - drop
    leaving = top_k(-jnp.where(is_dropped, -1, least), n - keep)  # the dropped tokens, then the cheapest joins
    stays = jax.vmap(lambda leaving: jnp.ones(n, jnp.int32).at[leaving].set(0))(leaving)
    root = jnp.where(stays, index, leader)
    for _ in range((n - keep).bit_length()):  # each step doubles the number of joins that are followed
        root = jnp.take_along_axis(root, root, axis=1)
    position = stays.cumsum(1) - 1
    target = jnp.where(is_dropped, -1, jnp.take_along_axis(position, root, axis=1))
    kept = jax.vmap(lambda stays, position: jnp.zeros(keep, jnp.int32).at[jnp.where(stays, position, keep)].set(
        index, mode='drop'))(stays, position)
    return merge_into(tokens, kept, leaving, jnp.take_along_axis(target, leaving, axis=1), keep_norm=True)


def _join_costs(x: Array, size: Array) -> Array:
    """Returns |x_i - x_j|² s_i s_j / (s_i + s_j), [B, N, N] float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=1, keepdims=True)  # keeps the distances, and cancels less in the difference below
    square = jnp.square(x).sum(-1)
    product = jnp.einsum('bid,bjd->bij', x, x, precision='highest')
    distance = jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)
    return distance / (1 / size[:, :, None] + 1 / size[:, None])
