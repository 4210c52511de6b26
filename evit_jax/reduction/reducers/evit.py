"""EViT keeps the tokens that the class token attends to, and fuses the others into one.

Source: Liang et al., "Not All Patches are What You Need", ICLR 2022, arXiv 2202.07800; youweiliang/evit.
"""

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.registry import register_reducer


@register_reducer('evit', can_fuse=True)
def EVIT(tokens, inputs, keep):
    """Keeps the top k tokens by class attention; fuses the others.

    The class attention is a = mean over the heads of softmax(q_class K^T / sqrt(d))    (section 3.1),
    the fused token           x_fused = sum over the tokens i that are not kept of a_i x_i    (section 3.2).

    The weights a_i are not renormalised.
    """
    a = inputs.class_attention  # [B, N]
    return keep_top(tokens, scores=a, keep=keep, fuse_weights=a if inputs.fuse else None)
