"""PiToMe protects informative tokens by their energy, and merges the most redundant tokens among themselves.

Source: Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024, arXiv 2405.16148;
hchautran/PiToMe.
"""

import jax
import jax.numpy as jnp

from evit_jax.reduction.merging import merge_into
from evit_jax.reduction.reducers.tome import TOME
from evit_jax.reduction.registry import register_reducer

MARGIN = 0.9  # margin of the first block


@register_reducer('pitome', merges=True, every_block=True, min_kept=TOME.min_kept)
def PITOME(tokens, inputs, keep):
    """Merges r = N - keep of the 2 r tokens with the highest energy into the others of them.

    Margin of block l of L: m = 0.9 - 0.9 l / L.
    Energy: E_i = mean of f(cos(k_i, k_j)) over all tokens j, with attention keys k averaged over the heads, and
    f(c) = c - m if c >= m, else exp(c - m) - 1. A token that resembles many others has a high energy.
    Matching: in the order of the energies, the 2 r tokens alternate between the sets A and B. Each token of A is merged
    into the most similar token of B. The N - 2 r tokens of low energy are protected.

    The energy is the ELU of c - m, as in the authors' code. Departures from that code: it sets the first margin by
    model (0.75 for DeiT and MAE, 0.95 for CLIP), and matches all tokens in half of the blocks of DeiT and MAE. Here the
    margin and the matching are those of the paper in all blocks.

    A call costs N² d multiply-accumulates for the similarities (2.5 M for N = 197, head width d = 64; a block of DeiT-S
    has 378 M) and r (N - r) D for the means (1.1 M for r = 16, D = 384).
    """
    r = tokens.patch_ids.shape[1] - keep
    if r == 0:
        return tokens
    margin = MARGIN * (1 - inputs.block / inputs.depth)
    k = inputs.mean_keys * jax.lax.rsqrt(jnp.maximum(jnp.square(inputs.mean_keys).sum(-1, keepdims=True), 1e-24))
    similarity = jnp.einsum('bid,bjd->bij', k, k, precision='highest')  # [B, N, N]
    energy = jax.nn.elu(similarity - margin).mean(-1)
    order = jnp.argsort(energy, axis=1, descending=True)
    a, b, protected = order[:, :2 * r:2], order[:, 1:2 * r:2], order[:, 2 * r:]

    similarity = jnp.take_along_axis(similarity, a[..., None], axis=1)  # [B, r, N]
    target = jnp.take_along_axis(similarity, b[:, None], axis=2).argmax(-1)  # [B, r], indices in B
    kept = jnp.concatenate([protected, b], axis=1)
    return merge_into(tokens, kept, merged=a, target=protected.shape[1] + target)
