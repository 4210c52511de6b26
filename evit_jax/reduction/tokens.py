"""Which tokens stay: top-k by score, with or without a token fused from the rest. Shapes are static."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from evit_jax.reduction.gather import chosen


class Tokens(NamedTuple):
    """Patch tokens and where they come from. What is None is not followed."""

    x: Array                   # [B, F + N, D]: F tokens in front (class, distillation), which always stay
    patch: Array               # [B, N] int32: row-major patch id; -1-s is the token fused at reduction s (0-based)
    token_of_patch: Array | None = None  # [B, P] int32: of each patch of the image, which token holds it; -1: none
    size: Array | None = None  # [B, N] float32: patches merged into each
    mask: Array | None = None  # [B, N] float32: 1, or 0 where the token is masked in place of being dropped

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens in front of those of the patches."""
        return self.x.shape[1] - self.patch.shape[1]


def keep_top(tokens: Tokens, score: Array, keep: int, gather_impl: str = '', training: bool = False) -> Tokens:
    """Keeps the `keep` tokens of highest score, best first.

    Args:
      score: [B, N] float32; only its order matters.
      keep: static; every new value compiles a new program.
      lowering: how the tokens are moved, as `gather_impl.chosen` takes it; `training` likewise.

    Raises:
      ValueError: `keep` is outside [1, N], or there is no such lowering.
    """
    rank = _rank(score, keep)
    x = chosen(gather_impl, training)(tokens.x, rank, None, tokens.num_prefix_tokens)
    return _ranked(tokens, rank, nowhere=-1)._replace(x=x)


def keep_top_and_fuse(tokens: Tokens, score: Array, keep: int, stage: int, weight: Array | None = None,
                      gather_impl: str = '', training: bool = False) -> Tokens:
    """Keeps the `keep` tokens of highest score and appends one that is the weighted sum of the others.

    The weights are not renormalised: the fused token is what the class token would have read from the dropped ones.

    Args:
      score: [B, N] float32, class attention.
      keep: static; every new value compiles a new program.
      stage: how many reductions came before; the fused token's patch id is -1-stage.
      weight: [B, N] float32, of the sum; None: the score.
      lowering: how the tokens are moved, as `gather_impl.chosen` takes it; `training` likewise.

    Returns:
      keep + 1 tokens.

    Raises:
      ValueError: `keep` is outside [1, N], or there is no such lowering.

    Source: EViT, section 3.2.
    """
    rank = _rank(score, keep)
    x = chosen(gather_impl, training)(tokens.x, rank, score if weight is None else weight, tokens.num_prefix_tokens)
    kept = _ranked(tokens, rank, nowhere=keep)
    fused = jnp.full((rank.shape[0], 1), -1 - stage, kept.patch.dtype)
    return kept._replace(x=x, patch=jnp.concatenate([kept.patch, fused], axis=1))


def remap(token_of_patch: Array | None, place: Array) -> Array | None:
    """Which token holds each patch, after the tokens went to other places.

    Args:
      home: [B, P] int32, before; -1: none.
      place: [B, N] int32, the new place of each token; -1: dropped.
    """
    if token_of_patch is None:
        return None
    return jnp.where(token_of_patch < 0, -1, jnp.take_along_axis(place, jnp.maximum(token_of_patch, 0), axis=1))


def fused_origin(patch: Array, score: Array, kept: Array, before: tuple[Array, ...], patches: int) -> Array:
    """How much of each patch is in the token that a reduction fuses.

    A fused token that is dropped again counts by the patches that were fused into it, each by its share of that token
    times the token's own weight. (The blocks between change both; this is what the reductions alone did.)

    Args:
      patch: [B, N] int32, the ids that enter the reduction.
      score: [B, N] float32, their class attention.
      kept: [B, K] int32, the ids that leave it.
      before: of the reductions before this one, what this function said of them.
      patches: of the image.

    Returns:
      [B, patches] float32, 0 for what is not in it; in the first reduction the class attention.
    """
    def place(ids):
        return jnp.where(ids < 0, patches - 1 - ids, ids)  # the fused tokens behind the patches

    def weights_of(patch, score, kept):
        weights = jnp.zeros(patches + len(before) + 1, score.dtype).at[place(patch)].add(score)
        return weights.at[place(kept)].set(0)

    weights = jax.vmap(weights_of)(patch, score, kept)
    earlier = (weights[:, patches + stage, None] * origin for stage, origin in enumerate(before))
    return sum(earlier, start=weights[:, :patches])


def _rank(score, keep):
    if not 1 <= keep <= score.shape[1]:
        raise ValueError(f'keep={keep} is outside [1, {score.shape[1]}]')
    def rank(score):
        return jax.lax.top_k(score, keep)[1]  # [B, keep]

    mesh = jax.sharding.get_abstract_mesh()
    devices = math.prod(mesh.shape[axis] for axis in mesh.auto_axes)
    if devices == 1 or score.shape[0] % devices:
        return rank(score)
    # XLA divides top_k on TPU alone; elsewhere it would collect the scores of all devices.
    batch = PartitionSpec(mesh.auto_axes)
    return jax.shard_map(rank, in_specs=batch, out_specs=batch, axis_names=set(mesh.auto_axes))(score)


def _ranked(tokens, rank, nowhere):
    """What is known of the tokens of `rank`; `nowhere` is where the patches of the others are from now on."""
    token_of_patch = remap(tokens.token_of_patch, _places(rank, tokens.patch.shape[1], nowhere))
    known = tokens._replace(x=None, token_of_patch=None)
    return jax.tree.map(lambda of: jnp.take_along_axis(of, rank, axis=1), known)._replace(token_of_patch=token_of_patch)


def _places(rank, tokens, nowhere):
    """Of each token the place where `rank` [B, K] puts it, [B, N] int32."""
    def places(rank):
        return jnp.full(tokens, nowhere, jnp.int32).at[rank].set(jnp.arange(len(rank), dtype=jnp.int32))

    return jax.vmap(places)(rank)
