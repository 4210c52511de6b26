"""Losses on logits."""

import optax
from jax import Array


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean soft-target cross entropy of [B, L] float32 logits."""
    return optax.softmax_cross_entropy(logits, targets).mean()
