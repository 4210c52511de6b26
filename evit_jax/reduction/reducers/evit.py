"""EViT keeps the tokens with the most class attention, and fuses the others into one.

Source: Liang et al., "Not All Patches are What You Need", ICLR 2022, arXiv 2202.07800; youweiliang/evit.
"""

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.registry import register_reducer


@register_reducer('evit', can_fuse=True, same_in_all_blocks=True, importance='')
def EVIT(tokens, inputs, keep):
    """Keeps the top k tokens by class attention; fuses the others.

    Class attention (section 3.1): a = softmax(q_class K^T / sqrt(d)), averaged over the heads.
    Fused token (section 3.2): x_fused = sum of a_i x_i over the tokens i that are not kept.

    The weights a_i are not renormalised. A model without a class token uses the mean attention that a token receives;
    'evit:norm' and other names choose another importance (`inputs.IMPORTANCES`).
    """
    a = inputs.importance  # [B, N]
    return keep_top(tokens, scores=a, keep=keep, fuse_weights=a if inputs.fuse else None)
