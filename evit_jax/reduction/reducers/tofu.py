"""ToFu matches tokens as ToMe does. It prunes the matched tokens in the first blocks, and merges them in the last ones.

Source: Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024,
arXiv 2312.01026.
"""

import jax
import jax.numpy as jnp

from evit_jax.reduction.merging import match_pairs, merge_into
from evit_jax.reduction.reducers.tome import TOME
from evit_jax.reduction.registry import register_reducer


@register_reducer('tofu', merges=True, every_block=True, min_kept=TOME.min_kept)
def TOFU(tokens, inputs, keep):
    """Drops or merges one token of each of the N - keep most similar pairs.

    Early blocks, l <= L / 2: the token is dropped. These blocks respond to a mean of two inputs far from linearly.
    Late blocks: the group of a token becomes x = (mean / |mean|) max |x_i| over the tokens i of the group (MLERP). A
    plain mean is shorter than its members.

    Block L / 2 is the boundary of two public implementations (hchautran/PiToMe, Westlake-AI/OpenToMe). These do not
    track sizes. Here means and attention count patches, as in ToMe; a dropped token adds no patches.

    A call costs N² d / 4 multiply-accumulates for the similarities, as in ToMe (0.6 M for N = 197, head width d = 64; a
    block of DeiT-S has 378 M), and r (N - r) D for the means (1.1 M for r = 16, D = 384).
    """
    kept, merged, target = match_pairs(inputs.mean_keys, keep, tokens.num_prefix_tokens)
    if inputs.block <= inputs.depth // 2:
        return merge_into(tokens, kept, merged[:, :0], target[:, :0])
    means = merge_into(tokens, kept, merged, target)
    norm, mean = _norm(tokens.patches), means.patches.astype(jnp.float32)
    longest = jnp.where(jax.nn.one_hot(target, keep, dtype=bool), jnp.take_along_axis(norm, merged, axis=1)[..., None],
                        0).max(axis=1, initial=0)  # [B, K], over the merged tokens of each group
    longest = jnp.maximum(longest, jnp.take_along_axis(norm, kept, axis=1))
    x = mean * (longest / _norm(mean))[..., None]
    return means.replace(x=jnp.concatenate([tokens.prefix, x.astype(means.x.dtype)], axis=1))


def _norm(x):
    return jnp.sqrt(jnp.maximum(jnp.square(x.astype(jnp.float32)).sum(-1), 1e-24))  # its gradient at 0 is finite
