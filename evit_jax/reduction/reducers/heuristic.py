"""The radial heuristic keeps the tokens nearest to the centre of the image: a control that ignores all content.

Source: Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCVW 2023,
arXiv 2308.04657; JoakimHaurum/TokenReduction, heuristic.py.
"""

import jax.numpy as jnp
import numpy as np

from evit_jax.reduction.gather import keep_top
from evit_jax.reduction.registry import register_reducer


@register_reducer('heuristic', can_fuse=True, importance='')
def HEURISTIC(tokens, inputs, keep):
    """Keeps the K tokens nearest to the image centre; fuses the others, weighted by importance.

    Distance of the patch in row y and column x of a grid of H rows and W columns:
    |(y, x) - ((H - 1) / 2, (W - 1) / 2)|, the l2 pattern of the source. Of equal distances, the first patch is kept.

    The source keeps all patches within a radius, so its counts are those of whole rings; it fuses nothing. A fused
    token has no position: it is farther than all patches. A call ranks N distances (197 for a DeiT-S at 224
    pixels) and needs no multiply-accumulates.

    Raises:
      ValueError: the grid of the patches is unknown.
    """
    if inputs.grid is None:
        raise ValueError('reducer heuristic needs the grid of the patches: pass grid=(rows, columns) to Reductions')
    rows, columns = np.indices(inputs.grid) - (np.asarray(inputs.grid)[:, None, None] - 1) / 2
    distance = np.append(np.hypot(rows, columns), sum(inputs.grid)).astype(np.float32)  # the last is the fused token's
    ids = jnp.where(tokens.patch_ids < 0, distance.size - 1, tokens.patch_ids)
    return keep_top(tokens, -jnp.asarray(distance)[ids], keep, fuse_weights=inputs.fuse_weights)
