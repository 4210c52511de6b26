"""Losses on logits, and on what was seen on the way to them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean soft-target cross entropy of [B, L] float32 logits."""
    return optax.softmax_cross_entropy(logits, targets).mean()


def kept_share(decisions: Sequence[Array], shares: Sequence[float]) -> Array:
    """How far the shares of tokens that stay are from those wanted: squared, the mean of images and reductions.

    Args:
      decisions: per reduction [B, N] float32: 1 of what stays, or 0.
      shares: wanted at each, of all N.

    Returns:
      A scalar; 0 where nothing is reduced.

    Source: DynamicViT, equation 12.
    """
    apart = [jnp.mean((decision.mean(1) - share) ** 2) for decision, share in zip(decisions, shares, strict=True)]
    return jnp.asarray(sum(apart) / max(len(apart), 1), jnp.float32)


def divergence(logits: Array, teacher: Array) -> Array:
    """KL(teacher || student) of [B, L] float32 logits: the sum over classes, the mean of the images.

    The teacher gets no gradient.

    Source: DynamicViT, equation 11; its `F.kl_div(..., reduction='batchmean')`.
    """
    wanted = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.sum(jnp.exp(wanted) * (wanted - jax.nn.log_softmax(logits)), axis=-1))


def token_distance(tokens: Array, teacher: Array, mask: Array) -> Array:
    """Mean squared difference of tokens to a teacher's, over all channels of all tokens that stay in the batch.

    An image that keeps more counts more. Neither the teacher nor the decisions get a gradient.

    Args:
      tokens, teacher: [B, N, D] float32, patch tokens alone, behind the last norm.
      stays: [B, N] float32: 1 of what stays to the end, or 0.

    Returns:
      A scalar; 0 where nothing stays.

    Source: DynamicViT, equation 10; its code means tokens of the whole batch.
    """
    mask = jax.lax.stop_gradient(mask)
    apart = jnp.square(tokens - jax.lax.stop_gradient(teacher)).mean(-1)
    return jnp.sum(apart * mask) / jnp.maximum(mask.sum(), 1)


def hard_distillation(logits: Array, teacher: Array) -> Array:
    """Mean cross entropy of [B, L] float32 logits with the class that the teacher's logits name.

    Source: DeiT, section 4; its `losses.py`.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, teacher.argmax(-1)).mean()


def soft_distillation(logits: Array, teacher: Array, tau: float) -> Array:
    """tau^2 KL(teacher || student) of [B, L] float32 logits divided by tau.

    The mean of the classes, too, as in the reference's code; the paper's sum over them is L times as much.

    Source: DeiT, equation 2; its `losses.py`.
    """
    return tau**2 * divergence(logits / tau, teacher / tau) / logits.shape[-1]


def sparse_cross_entropy(logits: Array, value: Array, index: Array, floor: Array) -> Array:
    """Cross entropy with targets of which few classes have a value of their own.

    Args:
      logits: [..., L] float32.
      value, index: [..., K], of these classes; a class that is named twice has the sum.
      floor: [...], added to the target of every class.

    Returns:
      [...] float32.
    """
    logs = jax.nn.log_softmax(logits)
    get_reducer = (value * jnp.take_along_axis(logs, index, axis=-1)).sum(-1)
    return -get_reducer - floor * logs.sum(-1)
