"""Computes multi-head attention from projected queries, keys and values [B, N, 3 D].

TPUs compute the heads one by one, because the transpose to [B, H, N, d] takes longer than the products. Other platforms
compute all heads at once.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.kernels.platforms import by_platform

_MASK_EPSILON = 1e-6  # added, divided by N, to each weight of DynamicViT's masked softmax
_LONG = 512  # number of tokens from which the queries are split
_MAX_WEIGHTS = 2**22  # attention weights [B, H, Q, N] of one part of the queries: 16 MB in float32, near a cache's size
_MAX_PARTS = 32


@flax.struct.dataclass
class AttentionOutput:
    """The output of an attention layer, and methods that compute more from its queries, keys and values.

    N counts all tokens, prefix tokens included. H is the number of heads, d the number of channels per head.
    """

    out: Array              # [B, Q, D]: the first Q tokens are the queries
    class_attention: Array  # [B, N] float32: the class token's softmax row, averaged over the heads
    qkv: Array              # [B, N, 3 D]
    size: Array | None      # [B, N] float32: number of patches in each token (proportional attention); None: 1
    num_heads: int = flax.struct.field(pytree_node=False)
    mask: Array | None = None  # [B, N] float32: no other token attends to tokens with mask 0; None: none is masked

    def class_attention_per_head(self) -> Array:
        """Returns the class token's softmax row in each head, [B, H, N] float32."""
        q, k, _ = _split_heads(self.qkv, self.num_heads)
        return class_attention(_scale(q)[:, :, 0], k, *_expand((self.size, self.mask), 1))

    def received_attention(self) -> Array:
        """Returns the attention that each token receives, [B, N] float32: the mean over all patches and heads.

        A query of size s counts s times, a masked query not at all; the sum over the tokens is 1. This recomputes the
        softmax [B, H, N, N].
        """
        q, k, _ = _split_heads(self.qkv, self.num_heads)
        weight = jnp.ones(q.shape[::2], jnp.float32) if self.size is None else self.size
        weight = weight if self.mask is None else weight * self.mask
        weight = weight / jnp.maximum(weight.sum(axis=1, keepdims=True), 1e-6)  # all may be masked
        size, mask = _expand((self.size, self.mask), (1, 2))

        def received(q, weight):
            logits = jnp.einsum('bhqd,bhkd->bhqk', q, k, preferred_element_type=jnp.float32)
            return jnp.einsum('bhqk,bq->bk', _softmax(logits, size, mask), weight) / self.num_heads

        return sum(received(_scale(q[:, :, part]), weight[:, part]) for part in _query_parts(*q.shape[:3], k.shape[2]))

    def keys(self) -> Array:
        """Returns the keys of each head, [B, H, N, d]."""
        return _split_heads(self.qkv, self.num_heads)[1]

    def values(self) -> Array:
        """Returns the values of each head, [B, H, N, d]."""
        return _split_heads(self.qkv, self.num_heads)[2]

    def mean_keys(self) -> Array:
        """Returns the mean over the heads of the keys, [B, N, d] float32."""
        return by_platform(self.qkv, tpu=_mean_keys_head_by_head, default=_mean_keys_at_once, num_heads=self.num_heads)


def multi_head_attention(qkv: Array, num_heads: int, *, size: Array | None = None, mask: Array | None = None,
                         num_queries: int | None = None) -> AttentionOutput:
    """Computes softmax attention of all heads.

    Args:
      qkv: [B, N, 3 D].
      size: [B, N] float32: a token of size s counts as s equal tokens (ToMe's proportional attention).
      mask: [B, N] float32: no other token attends to a token with mask 0.
      num_queries: the first `num_queries` tokens are queries; None: all tokens.
    """
    out, class_row = by_platform(qkv, size, mask, tpu=_head_by_head, default=_heads_at_once, num_heads=num_heads,
                                 num_queries=num_queries)
    return AttentionOutput(out, class_row, qkv, size, num_heads, mask)


def class_attention(q: Array, k: Array, size: Array | None = None, mask: Array | None = None) -> Array:
    """Computes the class token's softmax row, without the N x N matrix.

    Args:
      q: [..., d], scaled query of the class token.
      k: [..., N, d].
      size, mask: [..., N] float32, as in `multi_head_attention`.

    Returns:
      [..., N] float32.
    """
    return _softmax(jnp.einsum('...d,...nd->...n', q, k, preferred_element_type=jnp.float32), size, mask)


def _heads_at_once(qkv, size, mask, num_heads, num_queries):
    # Move the heads axis ahead of the tokens: einsum over [B, N, H, d] takes 1.6 times as long on a CPU.
    q, k, v = _split_heads(qkv, num_heads)
    size, mask = _expand((size, mask), 1)
    q = _scale(q[:, :, :num_queries])
    parts = [slice(None)] if mask is not None else _query_parts(*q.shape[:3], k.shape[2])
    out = jnp.concatenate([softmax_product(q[:, :, part], k, v, size, mask) for part in parts], axis=2)
    out = out.transpose(0, 2, 1, 3)
    return out.reshape(*out.shape[:2], -1), class_attention(q[:, :, 0], k, size, mask).mean(axis=1)


def _head_by_head(qkv, size, mask, num_heads, num_queries):
    parts = jnp.split(qkv, 3 * num_heads, axis=-1)  # each [B, N, d]
    heads = [(_scale(q[:, :num_queries]), k, v) for q, k, v in zip(
        parts[:num_heads], parts[num_heads:2 * num_heads], parts[2 * num_heads:], strict=True)]
    out = [softmax_product(q, k, v, size, mask) for q, k, v in heads]
    class_row = sum(class_attention(q[:, 0], k, size, mask) for q, k, _ in heads) / num_heads
    return jnp.concatenate(out, axis=-1), class_row


def _query_parts(batch, heads, queries, keys):
    """Splits the queries of a long sequence into slices, so that the weights of a slice stay in the cache.

    The weights of 8 images with 1,370 tokens and 6 heads are 360 MB; split, the forward pass takes 0.7 of the time on a
    CPU (docs/performance.md). There are at most `_MAX_PARTS` slices, because each is compiled.
    """
    if keys < _LONG:
        return [slice(0, queries)]
    batch = batch if isinstance(batch, int) else 1  # symbolic in an exported model
    parts = min(-(-batch * heads * queries * keys // _MAX_WEIGHTS), _MAX_PARTS, queries)
    length = -(-queries // max(parts, 1))
    return [slice(start, start + length) for start in range(0, queries, length)]


def _mean_keys_head_by_head(qkv, num_heads):
    parts = jnp.split(qkv, 3 * num_heads, axis=-1)[num_heads:2 * num_heads]
    return sum(k.astype(jnp.float32) for k in parts) / num_heads


def _mean_keys_at_once(qkv, num_heads):
    return _split_heads(qkv, num_heads)[1].mean(axis=1, dtype=jnp.float32)


def _split_heads(qkv, num_heads):
    """Splits [B, N, 3 D] into queries, keys and values, each [B, H, N, d]."""
    return qkv.reshape(*qkv.shape[:2], 3, num_heads, -1).transpose(2, 0, 3, 1, 4)


def _expand(arrays, axes):
    """Inserts axes of length 1 into the arrays that are not None."""
    return [None if array is None else jnp.expand_dims(array, axes) for array in arrays]


def _softmax(logits, size, mask):
    """Computes the softmax over the last axis, in which a token of size s counts s times and a masked token not."""
    logits = logits if size is None else logits + jnp.log(size)
    return jax.nn.softmax(logits if mask is None else jnp.where(mask > 0, logits, jnp.finfo(logits.dtype).min))


def _scale(q):
    return q * q.shape[-1]**-0.5


def softmax_product(q, k, v, size, mask):
    """Computes softmax(q kᵀ) v; q is [..., Q, d], k and v [..., N, d], size and mask [..., N]."""
    logits = jnp.einsum('...qd,...kd->...qk', q, k, preferred_element_type=jnp.float32)
    # Divide after the product with V: this saves a pass over the N x N weights.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    if size is not None:
        weights = weights * size[..., None, :]
    if mask is not None:
        num_queries, n = weights.shape[-2:]
        weights = weights * _visible(mask)[..., :num_queries, :] + _MASK_EPSILON / n
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum('...qk,...kd->...qd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return out.astype(v.dtype)


def _visible(mask: Array) -> Array:
    """Expands the mask from [..., N] to [..., N, N]: each token attends to the unmasked tokens and to itself.

    Source: DynamicViT, `softmax_with_policy`.
    """
    itself = jnp.eye(mask.shape[-1], dtype=mask.dtype)
    return mask[..., None, :] * (1 - itself) + itself
