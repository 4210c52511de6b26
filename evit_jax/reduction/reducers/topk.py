"""Top-K keeps the tokens with the most class attention and drops the others: EViT without fusion, by counts of patches.

Source: Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCVW 2023,
arXiv 2308.04657; JoakimHaurum/TokenReduction, topk.py.
"""

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.reducer import floor_rate
from evit_jax.reduction.registry import register_reducer


@register_reducer('topk', same_in_all_blocks=True, importance='', num_kept=floor_rate)
def TOPK(tokens, inputs, keep):
    """Keeps the top k tokens by class attention.

    Count of reduction s (from 0) at rate r: floor(r^(s + 1) P) of the P patches, as in the source's comparison: 137,
    96, 67 of 196 at 0.7, where EViT's count, rounded up from the entering tokens, is 138, 97, 68.
    """
    return keep_top(tokens, scores=inputs.importance, keep=keep)
