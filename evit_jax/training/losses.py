"""Losses on logits and intermediates of the model."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Computes the mean cross entropy of [B, L] float32 logits with soft targets."""
    return optax.softmax_cross_entropy(logits, targets).mean()


def keep_ratio(masks: Sequence[Array], fractions: Sequence[float]) -> Array:
    """Computes the squared error of the fraction of unmasked tokens, averaged over images and reductions.

    Args:
      masks: [B, N] float32 for each reduction: 1 kept, 0 masked.
      fractions: requested fraction of the N tokens at each reduction.

    Returns:
      A scalar; 0 if there are no reductions.

    Source: DynamicViT, equation 12.
    """
    errors = [jnp.mean((mask.mean(1) - fraction) ** 2) for mask, fraction in zip(masks, fractions, strict=True)]
    return jnp.asarray(sum(errors) / max(len(errors), 1), jnp.float32)


def divergence(logits: Array, teacher: Array) -> Array:
    """Computes KL(teacher || student) of [B, L] float32 logits, summed over classes and averaged over images.

    The teacher gets no gradient.

    Source: DynamicViT, equation 11; its `F.kl_div(..., reduction='batchmean')`.
    """
    target = jax.nn.log_softmax(jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits)), axis=-1))


def token_distance(tokens: Array, teacher: Array, mask: Array) -> Array:
    """Computes the mean squared distance between the tokens of student and teacher.

    The mean is over all channels of all unmasked tokens in the batch, so an image with more unmasked tokens has more
    weight. The teacher and the mask get no gradient.

    Args:
      tokens, teacher: [B, N, D] float32, patch tokens after the last norm.
      mask: [B, N] float32: 1 for tokens kept until the last block, else 0.

    Returns:
      A scalar; 0 if all tokens are masked.

    Source: DynamicViT, equation 10; its code takes the mean over the whole batch.
    """
    mask = jax.lax.stop_gradient(mask)
    distance = jnp.square(tokens - jax.lax.stop_gradient(teacher)).mean(-1)
    return jnp.sum(distance * mask) / jnp.maximum(mask.sum(), 1)


def hard_distillation(logits: Array, teacher: Array) -> Array:
    """Computes the mean cross entropy of [B, L] float32 logits. The target is the class of the largest teacher logit.

    Source: DeiT, section 4; its `losses.py`.
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, teacher.argmax(-1)).mean()


def soft_distillation(logits: Array, teacher: Array, tau: float) -> Array:
    """Computes tau^2 KL(teacher || student) of [B, L] float32 logits divided by tau.

    The result is a mean over the classes, as in the reference code. The sum in the paper is L times as large.

    Source: DeiT, equation 2; its `losses.py`.
    """
    return tau**2 * divergence(logits / tau, teacher / tau) / logits.shape[-1]


def sparse_cross_entropy(logits: Array, value: Array, index: Array, floor: Array) -> Array:
    """Computes the cross entropy with sparse targets, which list the values of a few classes.

    Args:
      logits: [..., L] float32.
      value, index: [..., K], values and indices of these classes. The values of a class that is listed twice are added.
      floor: [...], value added to the target of each class.

    Returns:
      [...] float32.
    """
    logs = jax.nn.log_softmax(logits)
    get_reducer = (value * jnp.take_along_axis(logs, index, axis=-1)).sum(-1)
    return -get_reducer - floor * logs.sum(-1)
