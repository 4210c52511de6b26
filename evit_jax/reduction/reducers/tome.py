"""ToMe merges the most similar tokens in every block.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461; facebookresearch/ToMe.
"""

from evit_jax.reduction.merging import merge_matched
from evit_jax.reduction.registry import register_reducer


def _min_kept(entering):
    return entering - entering // 2  # each merged token is added to a token of the other half


@register_reducer('tome', merges=True, every_block=True, same_in_all_blocks=True, min_kept=_min_kept)
def TOME(tokens, inputs, keep):
    """Merges the N - keep pairs of tokens with the most similar attention keys (section 3)."""
    return merge_matched(tokens, inputs.mean_keys, keep)
