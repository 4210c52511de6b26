"""Activation functions of the MLPs, computed in float32."""

import math

import jax
import jax.numpy as jnp
from jax import Array


def gelu(x: Array) -> Array:
    """Computes the exact GELU.

    It uses `erf`. `jax.nn.gelu` uses `erfc`, which takes about twice as long on CPU and TPU.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """Approximates GELU by tanh."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def quick_gelu(x: Array) -> Array:
    """Approximates GELU by a sigmoid, as CLIP does."""
    wide = x.astype(jnp.float32)
    return (wide * jax.nn.sigmoid(1.702 * wide)).astype(x.dtype)


def silu(x: Array) -> Array:
    """Computes x * sigmoid(x)."""
    return jax.nn.silu(x.astype(jnp.float32)).astype(x.dtype)


ACTIVATIONS = {'gelu': gelu, 'gelu_tanh': gelu_tanh, 'quick_gelu': quick_gelu, 'silu': silu}
