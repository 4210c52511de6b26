"""How a reduction moves the tokens: one meaning, several programs of it, and for each platform the fastest.

What comes out is R x: in R a unit row for each token in front, one for each that is kept, and where the others are
fused a row of their weights. Which is the fastest where: docs/performance.md.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.tokens.names import look_up

Move = Callable[[Array, Array, Array | None], Array]
"""(x, rank, weight) -> the tokens in front, those of `rank`, and where there are weights one more, the sum of the rest.

x: [B, F + N, D], F tokens in front of those that are ranked.
rank: [B, K] int32, places among the N.
weight: [B, F + N] float32 of each token, 0 in front; None: nothing is fused.
Returns [B, F + K (+ 1), D] of the dtype of x.
"""


def gather(x: Array, rank: Array, weight: Array | None, front: int) -> Array:
    """Kept rows are looked up; the others are summed under a mask."""
    places = _places(rank, front)
    kept = jnp.take_along_axis(x, places[..., None], axis=1)
    if weight is None:
        return kept
    # Image by image, or XLA would collect the ranks of all devices for the scatter.
    weight = jax.vmap(lambda row, kept: row.at[kept].set(0))(weight, places)
    return _with_sum(kept, weight, x)


def one_hot(x: Array, rank: Array, weight: Array | None, front: int) -> Array:
    """Kept rows are a product with unit rows; the others are summed under a mask."""
    rows = _unit_rows(x, rank, front)
    kept = _product(rows, x)
    return kept if weight is None else _with_sum(kept, _of_the_rest(weight, rows), x)


def product(x: Array, rank: Array, weight: Array | None, front: int) -> Array:
    """All of R in one product; in bfloat16 the weights are rounded to it."""
    rows = _unit_rows(x, rank, front)
    if weight is not None:
        rows = jnp.concatenate([rows, _of_the_rest(weight, rows)[:, None].astype(rows.dtype)], axis=1)
    return _product(rows, x)


LOWERINGS = {'gather': gather, 'one_hot': one_hot, 'product': product}


def chosen(name: str, training: bool) -> Callable[..., Array]:
    """The lowering of a name; of '', on each platform the fastest.

    Args:
      training: a gradient is taken.

    Raises:
      ValueError: there is none; names the nearest.
    """
    if name:
        return look_up('lowering', name, LOWERINGS)
    return functools.partial(_by_platform, tpu=one_hot if training else product)


def _by_platform(x, rank, weight, front, tpu):
    return jax.lax.platform_dependent(x, rank, weight, tpu=functools.partial(tpu, front=front),
                                      default=functools.partial(gather, front=front))


def _places(rank, front):
    """Of all tokens that stay, those in front first: [B, F + K] int32."""
    first = jnp.broadcast_to(jnp.arange(front, dtype=rank.dtype), (len(rank), front))
    return jnp.concatenate([first, rank + front], axis=1)


def _unit_rows(x, rank, front):
    return jax.nn.one_hot(_places(rank, front), x.shape[1], dtype=x.dtype)  # [B, F + K, F + N]


def _of_the_rest(weight, rows):
    return weight * (1 - rows.sum(1, dtype=weight.dtype))


def _product(rows, x):
    # Where products round float32 to bfloat16, a row times 1 would not be that row.
    precision = 'highest' if x.dtype == jnp.float32 else None
    return jnp.einsum('bkn,bnd->bkd', rows, x, precision=precision)


def _with_sum(kept, weight, x):
    fused = jnp.einsum('bn,bnd->bd', weight, x, preferred_element_type=jnp.float32)
    return jnp.concatenate([kept, fused[:, None].astype(kept.dtype)], axis=1)
