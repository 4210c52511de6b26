"""Keeps the tokens with the highest scores: top-k, then a gather of their rows. Shapes are static.

The output of the gather is R x. R has a one-hot row for each prefix token and each kept token. If the other tokens are
fused, R has one more row with their weights. The functions below compute the same R x; docs/performance.md gives the
fastest function for each platform.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from evit_jax.kernels.platforms import by_platform
from evit_jax.reduction.tokens import Tokens, remap
from evit_jax.runtime.names import get_by_name

Gather = Callable[[Array, Array, Array | None, int], Array]
"""(x, index, weights, num_prefix_tokens) -> prefix tokens, kept tokens and, if given weights, the fused token.

x: [B, F + N, D], F prefix tokens.
index: [B, K] int32, indices of the kept tokens among the N patch tokens.
weights: [B, N] float32, weights of the other tokens in the fused token; None: nothing is fused.
Returns [B, F + K (+ 1), D] with the dtype of x.
"""


def keep_top(tokens: Tokens, scores: Array, keep: int, *, fuse_weights: Array | None = None) -> Tokens:
    """Keeps the `keep` tokens with the highest scores, best first. Optionally appends one token that fuses the others.

    The fused token is a weighted sum of the other tokens. The weights are not renormalised, as in EViT.

    Args:
      scores: [B, N]; only their order matters.
      keep: static; each value compiles its own program.
      fuse_weights: [B, N] weights of the other tokens in the fused token; None: the other tokens are dropped.

    Returns:
      `keep` tokens, or `keep + 1` with a fused token. The patch id of the fused token is -1 - tokens.stage.

    Raises:
      ValueError: `keep` is outside [1, N].

    Source: EViT, arXiv 2202.07800, section 3.2.
    """
    n = scores.shape[1]
    index = top_k(scores, keep)
    x = get_gather(tokens.gather_impl, tokens.train)(tokens.x, index, fuse_weights, tokens.num_prefix_tokens)
    dropped = -1 if fuse_weights is None else keep  # the new index of the tokens that are not kept
    new_index = jax.vmap(lambda kept: jnp.full(n, dropped, jnp.int32).at[kept].set(jnp.arange(keep, dtype=jnp.int32)))
    per_token = {'patch_ids': tokens.patch_ids, 'size': tokens.size, 'mask': tokens.mask, 'scores': scores}
    kept = tokens.replace(x=x, token_of_patch=remap(tokens.token_of_patch, new_index(index)), **{
        name: None if array is None else jnp.take_along_axis(array, index, axis=1)
        for name, array in per_token.items()})
    return kept if fuse_weights is None else _append_fused(kept, tokens, scores)


def _append_fused(kept, tokens, scores):
    """Appends the patch id, size, mask and score of the fused token. `kept.x` already contains its activations."""
    def append(array, last):
        return None if array is None else jnp.concatenate([array, last.astype(array.dtype)], axis=1)

    def rest(before, after):
        return None if after is None else before.sum(axis=1, keepdims=True) - after.sum(axis=1, keepdims=True)

    ones = jnp.ones((scores.shape[0], 1), jnp.int32)
    return kept.replace(
        patch_ids=append(kept.patch_ids, (-1 - tokens.stage) * ones),
        size=append(kept.size, rest(tokens.size, kept.size)),
        mask=append(kept.mask, ones), scores=append(kept.scores, rest(scores, kept.scores)))


def top_k(scores: Array, keep: int) -> Array:
    """Returns the indices [B, keep] int32 of the `keep` highest of the scores [B, N], best first.

    Raises:
      ValueError: `keep` is outside [1, N].
    """
    if not 1 <= keep <= scores.shape[1]:
        raise ValueError(f'keep={keep} is outside [1, {scores.shape[1]}]')

    def index(scores):
        return jax.lax.top_k(scores, keep)[1]

    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    if devices == 1 or scores.shape[0] % devices:
        return index(scores)
    # XLA partitions top_k only on TPUs; on other platforms it would gather the scores of all devices.
    batch = PartitionSpec(mesh.auto_axes)
    return jax.shard_map(index, in_specs=batch, out_specs=batch, axis_names=set(mesh.auto_axes))(scores)


def gather(x: Array, index: Array, weights: Array | None, num_prefix_tokens: int) -> Array:
    """Gathers the kept rows. The weighted sum of all rows, with weight 0 for the kept ones, is the fused token."""
    prefix, patches = jnp.split(x, [num_prefix_tokens], axis=1)
    rows = [prefix, jnp.take_along_axis(patches, index[..., None], axis=1)]
    if weights is not None:
        # Scatter image by image: otherwise XLA gathers the indices of all devices.
        weights = jax.vmap(lambda row, kept: row.at[kept].set(0))(weights, index)
        rows.append(_weighted_sum(weights, patches))
    return jnp.concatenate(rows, axis=1)


def one_hot(x: Array, index: Array, weights: Array | None, num_prefix_tokens: int) -> Array:
    """Multiplies by one-hot rows to copy the kept rows; the fused token is a separate weighted sum."""
    rows = _one_hot_rows(x, index, num_prefix_tokens)
    kept = _product(rows, x)
    if weights is None:
        return kept
    return jnp.concatenate([kept, _weighted_sum(_weights_of_rest(weights, rows), x)], axis=1)


def product(x: Array, index: Array, weights: Array | None, num_prefix_tokens: int) -> Array:
    """Computes R x as one product. For x in bfloat16, the weights are rounded to bfloat16."""
    rows = _one_hot_rows(x, index, num_prefix_tokens)
    if weights is not None:
        rest = _weights_of_rest(weights, rows)[:, None].astype(rows.dtype)
        rows = jnp.concatenate([rows, rest], axis=1)
    return _product(rows, x)


GATHERS = {'gather': gather, 'one_hot': one_hot, 'product': product}


def get_gather(name: str, train: bool) -> Gather:
    """Returns the gather with a name; for '', the fastest gather of each platform.

    Args:
      train: True if gradients are computed.

    Raises:
      ValueError: there is no gather with this name; the message gives the nearest name.
    """
    if name:
        return get_by_name('gather_impl', name, GATHERS)
    return functools.partial(_by_platform, tpu=_one_hot_on_tpu if train else _product_on_tpu)


def _by_platform(x, index, weights, num_prefix_tokens, tpu):
    return by_platform(x, index, weights, tpu=tpu, default=gather, num_prefix_tokens=num_prefix_tokens)


def _one_hot_on_tpu(x, index, weights, num_prefix_tokens):
    return _with_tpu_layout(one_hot(x, index, weights, num_prefix_tokens))


def _product_on_tpu(x, index, weights, num_prefix_tokens):
    return _with_tpu_layout(product(x, index, weights, num_prefix_tokens))


def _with_tpu_layout(out):
    # Without this constraint, XLA lays out the product image by image, then converts it for each linear layer.
    image_by_image = out.shape[1] % 128 == 0  # a good layout if the tokens fill the lanes of the TPU
    return with_layout_constraint(out, Layout((0, 1, 2) if image_by_image else (1, 0, 2)))


def _one_hot_rows(x, index, num_prefix_tokens):
    prefix = jnp.broadcast_to(jnp.arange(num_prefix_tokens, dtype=index.dtype), (index.shape[0], num_prefix_tokens))
    return jax.nn.one_hot(jnp.concatenate([prefix, num_prefix_tokens + index], axis=1), x.shape[1], dtype=x.dtype)


def _weights_of_rest(weights, rows):
    weights = jnp.pad(weights, ((0, 0), (rows.shape[2] - weights.shape[1], 0)))
    return weights * (1 - rows.sum(1, dtype=weights.dtype))


def _product(rows, x):
    # At default precision TPUs round float32 operands to bfloat16; a one-hot row would then not copy x exactly.
    precision = 'highest' if x.dtype == jnp.float32 else None
    return jnp.einsum('bkn,bnd->bkd', rows, x, precision=precision)


def _weighted_sum(weights, x):
    return jnp.einsum('bn,bnd->bd', weights, x, preferred_element_type=jnp.float32).astype(x.dtype)[:, None]
