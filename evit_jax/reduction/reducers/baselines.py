"""Baselines: reducers that ignore the content of the tokens, or rank the tokens in reverse order."""

import jax

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.merging import merge_runs
from evit_jax.reduction.registry import register_reducer


@register_reducer('random', can_fuse=True, importance='')
def RANDOM(tokens, inputs, keep):
    """Keeps random tokens; fuses the others, weighted by importance."""
    n = tokens.patch_ids.shape[1]
    scores = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(inputs.rng)
    return keep_top(tokens, scores, keep, fuse_weights=inputs.fuse_weights)


@register_reducer('least', can_fuse=True, importance='')
def LEAST(tokens, inputs, keep):
    """Keeps the tokens with the least importance, by default class attention; fuses the others, weighted by it."""
    return keep_top(tokens, -inputs.importance, keep, fuse_weights=inputs.fuse_weights)


@register_reducer('pool', merges=True)
def POOL(tokens, inputs, keep):
    """Merges runs of neighbours. Unlike ToMe, it ignores the similarity of the tokens."""
    return merge_runs(tokens, keep)
