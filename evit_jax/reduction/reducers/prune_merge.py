"""Prune-merge drops the least important tokens of a block, then merges others; a plan gives both counts.

Sources of the idea: DiffRate, Chen et al., ICCV 2023, arXiv 2305.17997; PPT, Wu et al., arXiv 2310.01812. Departure:
both merge by ToMe's matching of keys. Here the tokens merge as in `ward`, which loses less.
"""

from evit_jax.reduction.reducers.ward import join_cheapest
from evit_jax.reduction.registry import register_reducer


@register_reducer('prune_merge', can_drop=True, merges=True, every_block=True, same_in_all_blocks=True, importance='')
def PRUNE_MERGE(tokens, inputs, keep):
    """Drops the `inputs.drop` least important tokens, then merges others until `keep` are left.

    Importance: class attention, or another of `inputs.IMPORTANCES`. Merging: see `ward.WARD`. Without counts to drop it
    equals `ward`. A call costs as much as one of `ward`.
    """
    return join_cheapest(tokens, inputs.importance, keep, drop=inputs.drop)
