"""Baselines: reducers that ignore the content of the tokens, or rank it the wrong way round."""

import jax

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.merging import merge_runs
from evit_jax.reduction.registry import register_reducer


@register_reducer('random', can_fuse=True)
def RANDOM(tokens, inputs, keep):
    """Keeps random tokens; the others are fused by class attention."""
    n = tokens.patch_ids.shape[1]
    scores = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(inputs.rng)
    return keep_top(tokens, scores, keep, fuse_weights=inputs.fuse_weights)


@register_reducer('least', can_fuse=True)
def LEAST(tokens, inputs, keep):
    """Keeps the tokens with the least class attention; the others are fused by class attention."""
    return keep_top(tokens, -inputs.class_attention, keep, fuse_weights=inputs.fuse_weights)


@register_reducer('pool', merges=True)
def POOL(tokens, inputs, keep):
    """Merges runs of neighbours. It differs from ToMe only in the choice of the tokens that are merged."""
    return merge_runs(tokens, keep)
