"""How a reduction moves the tokens: one meaning, several programs of it, and for each platform the fastest.

What comes out is R x: in R a unit row for each token in front, one for each that is kept, and where the others are
fused a row of their weights. Which is the fastest where: docs/performance.md.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from evit_jax.runtime.names import get_by_name

Move = Callable[[Array, Array, Array | None, int], Array]
"""(x, rank, weight, front) -> the tokens in front, those of `rank`, and with weights one more, the sum of the rest.

x: [B, F + N, D], F = `num_prefix_tokens` tokens in front of those that are ranked.
rank: [B, K] int32, places among the N.
weight: [B, N] float32; None: nothing is fused.
Returns [B, F + K (+ 1), D] of the dtype of x.
"""


def gather(x: Array, rank: Array, weight: Array | None, num_prefix_tokens: int) -> Array:
    """Kept rows are looked up; the others are summed under a mask."""
    in_front, ranked = jnp.split(x, [num_prefix_tokens], axis=1)
    rows = [in_front, jnp.take_along_axis(ranked, rank[..., None], axis=1)]
    if weight is not None:
        # Image by image, or XLA would collect the ranks of all devices for the scatter.
        weight = jax.vmap(lambda row, kept: row.at[kept].set(0))(weight, rank)
        rows.append(_sum(weight, ranked))
    return jnp.concatenate(rows, axis=1)


def one_hot(x: Array, rank: Array, weight: Array | None, num_prefix_tokens: int) -> Array:
    """Kept rows are a product with unit rows; the others are summed under a mask."""
    rows = _unit_rows(x, rank, num_prefix_tokens)
    kept = _product(rows, x)
    return kept if weight is None else jnp.concatenate([kept, _sum(_of_the_rest(weight, rows), x)], axis=1)


def product(x: Array, rank: Array, weight: Array | None, num_prefix_tokens: int) -> Array:
    """All of R in one product; in bfloat16 the weights are rounded to it."""
    rows = _unit_rows(x, rank, num_prefix_tokens)
    if weight is not None:
        rows = jnp.concatenate([rows, _of_the_rest(weight, rows)[:, None].astype(rows.dtype)], axis=1)
    return _product(rows, x)


GATHERS = {'gather': gather, 'one_hot': one_hot, 'product': product}


def chosen(name: str, training: bool) -> Move:
    """The lowering of a name; of '', on each platform the fastest.

    Args:
      training: a gradient is taken.

    Raises:
      ValueError: there is none; names the nearest.
    """
    if name:
        return get_by_name('gather_impl', name, GATHERS)
    return functools.partial(_by_platform, tpu=one_hot if training else product)


def _by_platform(x, rank, weight, num_prefix_tokens, tpu):
    def multiplied(x, rank, weight):
        # Left to itself XLA lays out image by image what a product has left, and anew for every linear layer.
        after = tpu(x, rank, weight, num_prefix_tokens)
        image_by_image = after.shape[1] % 128 == 0  # suits a TPU where the tokens fill its lanes
        return with_layout_constraint(after, Layout((0, 1, 2) if image_by_image else (1, 0, 2)))

    default = functools.partial(gather, num_prefix_tokens=num_prefix_tokens)
    return jax.lax.platform_dependent(x, rank, weight, tpu=multiplied, default=default)


def _unit_rows(x, rank, num_prefix_tokens):
    first = jnp.broadcast_to(jnp.arange(num_prefix_tokens, dtype=rank.dtype), (rank.shape[0], num_prefix_tokens))
    return jax.nn.one_hot(jnp.concatenate([first, num_prefix_tokens + rank], axis=1), x.shape[1], dtype=x.dtype)


def _of_the_rest(weight, rows):
    weight = jnp.pad(weight, ((0, 0), (rows.shape[2] - weight.shape[1], 0)))
    return weight * (1 - rows.sum(1, dtype=weight.dtype))


def _product(rows, x):
    # Where products round float32 to bfloat16, a row times 1 would not be that row.
    precision = 'highest' if x.dtype == jnp.float32 else None
    return jnp.einsum('bkn,bnd->bkd', rows, x, precision=precision)


def _sum(weight, x):
    return jnp.einsum('bn,bnd->bd', weight, x, preferred_element_type=jnp.float32).astype(x.dtype)[:, None]
