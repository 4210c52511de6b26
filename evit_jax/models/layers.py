"""Layers of the vision transformers: attention, MLP, LayerScale, attention pooling, drop path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.kernels.activations import ACTIVATIONS
from evit_jax.kernels.attention import AttentionOutput, multi_head_attention
from evit_jax.kernels.rope import rotate
from evit_jax.models.config import ViTConfig


def linear(features_in: int, features_out: int, *, bias: bool = True, std: float = 0.02, dtype,
           rngs: nnx.Rngs) -> nnx.Linear:
    """Makes a linear layer initialised as in DeiT: truncated normal weights, zero bias."""
    return nnx.Linear(features_in, features_out, use_bias=bias, dtype=dtype, rngs=rngs,
                      kernel_init=nnx.initializers.truncated_normal(stddev=std))


class Attention(nnx.Module):
    """Multi-head self-attention."""

    def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
        width, std = config.width, config.init_std
        self.heads, self.rope, self.rope_base = config.heads, config.rope, config.rope_base
        self.qkv = linear(width, 3 * width, bias=config.qkv_bias and config.k_bias, std=std, dtype=dtype, rngs=rngs)
        self.has_qv_bias = config.qkv_bias and not config.k_bias
        if self.has_qv_bias:
            self.q_bias, self.v_bias = nnx.Param(jnp.zeros(width)), nnx.Param(jnp.zeros(width))
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = (nnx.LayerNorm(width // config.heads, epsilon=config.norm_epsilon, dtype=dtype,
                                                      rngs=rngs) for _ in range(2))
        self.proj = linear(width, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, *, size: Array | None = None, mask: Array | None = None,
                 coordinates: Array | None = None, num_queries: int | None = None) -> AttentionOutput:
        """Computes attention among the tokens.

        Args:
          x: [B, N, D], prefix tokens first.
          size, mask: see `multi_head_attention`; [B, N'] for the last N' tokens. The tokens before them have 1.
          coordinates: see `rope.rotate`; [B, N', 2] or [1, N', 2] for the last N' tokens. The tokens before them are
            not rotated. None: the model has no rotary position embedding.
          num_queries: number of first tokens that are queries; None: all.
        """
        size, mask = (None if array is None else jnp.pad(
            array, ((0, 0), (x.shape[1] - array.shape[1], 0)), constant_values=1) for array in (size, mask))
        attention = multi_head_attention(self._qkv(x, coordinates), self.heads, size=size, mask=mask,
                                         num_queries=num_queries)
        return attention.replace(out=self.proj(attention.out))

    def _qkv(self, x, coordinates):
        """Returns queries, keys and values [B, N, 3 D]. Queries and keys are normalised and rotated if configured."""
        qkv = self.qkv(x)
        if self.has_qv_bias:
            qkv += jnp.concatenate([self.q_bias[...], jnp.zeros(x.shape[-1]), self.v_bias[...]]).astype(qkv.dtype)
        if coordinates is None and not self.qk_norm:
            return qkv
        q, k, v = jnp.moveaxis(qkv.reshape(*x.shape[:2], 3, self.heads, -1), 2, 0)  # each [B, N, H, d]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if coordinates is not None:
            # A rotation by the coordinates 0 changes nothing.
            coordinates = jnp.pad(coordinates, ((0, 0), (x.shape[1] - coordinates.shape[1], 0), (0, 0)))
            q, k = (rotate(array, coordinates, base=self.rope_base, interleaved=self.rope == 'eva')
                    for array in (q, k))
        return jnp.stack([q, k, v], axis=2).reshape(qkv.shape)


class LayerScale(nnx.Module):
    """Multiplies each channel of a residual branch by a learned factor.

    Source: Touvron et al., arXiv 2103.17239.
    """

    def __init__(self, width: int, initial: float):
        self.gamma = nnx.Param(jnp.full(width, initial))

    def __call__(self, x: Array) -> Array:
        return x * self.gamma[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Linear, activation, linear; or the gated form fc2(activation(gate) * value), SwiGLU if the activation is SiLU.

    Source: SwiGLU, arXiv 2002.05202; the norm before fc2, EVA-02, arXiv 2303.11331.
    """

    def __init__(self, config: ViTConfig, *, dtype, rngs: nnx.Rngs):
        width, hidden, std = config.width, config.mlp_hidden, config.init_std
        self.activation, self.gated = ACTIVATIONS[config.activation], config.swiglu
        self.fc1 = linear(width, hidden * (2 if self.gated else 1), std=std, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.LayerNorm, hidden, epsilon=config.norm_epsilon, dtype=dtype, rngs=rngs)
        self.norm = norm() if config.mlp_norm else None
        self.fc2 = linear(hidden, width, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.fc1(x)
        if self.gated:
            gate, value = jnp.split(x, 2, axis=-1)
            x = self.activation(gate) * value
        else:
            x = self.activation(x)
        return self.fc2(x if self.norm is None else self.norm(x))


class AttentionPool(nnx.Module):
    """Pools tokens by the attention of one learned query, then an MLP (multi-head attention pooling, MAP).

    Source: Set Transformer, arXiv 1810.00825; SigLIP, arXiv 2303.15343.
    """

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
        width = config.width
        dense = functools.partial(linear, dtype=jnp.float32, rngs=rngs)
        self.heads = config.heads
        self.latent = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)) * width**-0.5)
        self.q, self.kv, self.proj = dense(width, width), dense(width, 2 * width), dense(width, width)
        self.norm = nnx.LayerNorm(width, epsilon=config.norm_epsilon, dtype=jnp.float32, rngs=rngs)
        self.mlp = Mlp(dataclasses.replace(config, swiglu=False, mlp_norm=False), dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array, weight: Array) -> Array:
        """Pools tokens.

        Args:
          x: [B, N, D] float32.
          weight: [B, N] float32, number of patches in each token; a token of weight w counts as w equal tokens.

        Returns:
          [B, D] float32.
        """
        v = jnp.split(self.kv(x), 2, axis=-1)[1]
        v = v.reshape(*x.shape[:2], self.heads, -1)
        pooled = jnp.einsum('bhn,bnhd->bhd', self.attention(x, weight), v, precision='highest')
        pooled = self.proj(pooled.reshape(x.shape[0], -1))
        return pooled + self.mlp(self.norm(pooled))

    def attention(self, x: Array, weight: Array) -> Array:
        """Returns the attention of the query to each token in each head, [B, H, N] float32."""
        k = jnp.split(self.kv(x), 2, axis=-1)[0]
        k = k.reshape(*x.shape[:2], self.heads, -1)
        q = self.q(self.latent[...]).reshape(self.heads, -1) * k.shape[-1]**-0.5
        logits = jnp.einsum('hd,bnhd->bhn', q, k, precision='highest')
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))) * weight[:, None]
        return weights / weights.sum(axis=-1, keepdims=True)


def drop_path(x: Array, rate: float, key: Array | None) -> Array:
    """Drops a residual branch for random images, and scales it up for the others (stochastic depth).

    Args:
      x: [B, ...] the branch.
      key: random key; None returns the branch unchanged (evaluation).
    """
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)
