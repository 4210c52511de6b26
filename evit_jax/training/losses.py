"""Losses on logits."""

import jax
import jax.numpy as jnp
import optax
from jax import Array


def smooth_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """[B] int labels to [B, L] float32 targets, `smoothing` of the weight spread over all classes."""
    return optax.smooth_labels(jax.nn.one_hot(labels, classes, dtype=jnp.float32), smoothing)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean soft-target cross entropy of [B, L] float32 logits."""
    return optax.softmax_cross_entropy(logits, targets).mean()
