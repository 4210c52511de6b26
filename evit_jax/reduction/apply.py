"""Applies the reducer of a plan in a forward pass, and records each reduction."""

import collections
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.kernels.attention import AttentionOutput
from evit_jax.reduction.inputs import ModelInputs, ReducerInputs
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.tokens import Tokens, sum_over_patches

Reduce = Callable[[Tokens, AttentionOutput], Tokens]
RECORDS = ('kept', 'patch_ids', 'token_of_patch', 'class_attention', 'mask', 'fused_weights')


class Reductions:
    """The reductions of one forward pass.

    Args:
      plan: static.
      rng: [B] random keys, one per image.
      model: the parts of the model that the reductions read.
    """

    def __init__(self, plan: TokenPlan, rng: Array, model: ModelInputs):
        self._plan, self._rng, self._model = plan, rng, model
        self._records: dict[str, tuple] = collections.defaultdict(tuple, dict.fromkeys(RECORDS, ()))

    def before_block(self, block: int, tokens: Tokens) -> Tokens:
        """Reduces the tokens before a block, if the plan reduces there and the reducer acts before the block."""
        if self._plan.keep[block] is None or not self._plan.reducer.before_block:
            return tokens
        return self._reduce(tokens, None, block)

    def in_block(self, block: int) -> Reduce | None:
        """Returns the reduction between attention and MLP of a block, or None."""
        if self._plan.keep[block] is None or self._plan.reducer.before_block:
            return None
        return functools.partial(self._reduce, block=block)

    def records(self) -> dict[str, tuple]:
        """Returns the recorded arrays by name: a tuple with one entry per reduction for each name."""
        return dict(self._records)

    def _reduce(self, tokens: Tokens, attention: AttentionOutput | None, block: int) -> Tokens:
        plan, stage = self._plan, tokens.stage
        rng = jax.vmap(lambda key: jax.random.fold_in(key, stage))(self._rng)
        inputs = ReducerInputs(tokens, attention, plan, block, rng, self._model)
        after = plan.reducer.reduce(tokens, inputs, plan.keep[block])
        leaving = after.patch_ids.shape[1], plan.counts[block]
        if leaving[0] != leaving[1]:
            raise ValueError(f'reducer {plan.reducer} returned {leaving[0]} patch tokens at block {block}, and the '
                             f'plan has {leaving[1]}: keep={plan.keep[block]}, fuse={plan.fused}')
        self._record('kept', after.patch_ids)
        self._record('patch_ids', tokens.patch_ids)
        self._record('token_of_patch', after.token_of_patch)
        self._record('mask', after.mask)
        if attention is not None and self._model.has_class_token:
            self._record('class_attention', inputs.class_attention)
        if attention is not None and plan.fused:
            self._record('fused_weights', fused_weights(
                tokens.patch_ids, inputs.importance, after.patch_ids, self._records['fused_weights'],
                tokens.token_of_patch.shape[1]))
        for name, array in inputs.records.items():
            self._record(name, array)
        return after.replace(stage=stage + 1, coordinates=self._mean_coordinates(after))

    def _mean_coordinates(self, tokens):
        """Returns the mean rotary coordinates of the patches in each token, [B, N, 2]; None if the model has none."""
        if self._model.coordinates is None:
            return None
        total = sum_over_patches(tokens.token_of_patch, self._model.coordinates[None], tokens.patch_ids.shape[1])
        sizes = sum_over_patches(tokens.token_of_patch, jnp.ones(tokens.token_of_patch.shape), total.shape[1])
        return total / jnp.maximum(sizes, 1)[..., None]  # a token without patches keeps the coordinates 0

    def _record(self, name, array):
        if array is not None:
            self._records[name] += (array,)


def fused_weights(patch_ids: Array, scores: Array, kept: Array, before: tuple[Array, ...], patches: int) -> Array:
    """Computes the weight of each patch in the token that a reduction fuses.

    A fused token may itself be dropped and fused later. The weight of a patch is then its weight in the earlier fused
    token, times the weight of that token. Changes by the blocks between the reductions are not included.

    Args:
      patch_ids: [B, N] int32, patch ids of the tokens that enter the reduction.
      scores: [B, N] float32, importance of these tokens.
      kept: [B, K] int32, patch ids of the tokens that leave the reduction.
      before: outputs of this function for the earlier reductions.
      patches: number of patches of the image.

    Returns:
      [B, patches] float32; 0 for a patch that is not in the token. For the first reduction, the weights are the
      importance.
    """
    def index(ids):
        return jnp.where(ids < 0, patches - 1 - ids, ids)  # fused tokens follow the patches

    def weights_of(patch_ids, scores, kept):
        weights = jnp.zeros(patches + len(before) + 1, scores.dtype).at[index(patch_ids)].add(scores)
        return weights.at[index(kept)].set(0)

    weights = jax.vmap(weights_of)(patch_ids, scores, kept)
    earlier = (weights[:, patches + stage, None] * inside for stage, inside in enumerate(before))
    return sum(earlier, start=weights[:, :patches])
