"""Clustering replaces the tokens by the K clusters of their activations: DPC-KNN and K-medoids.

Sources: Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCVW 2023,
arXiv 2308.04657; JoakimHaurum/TokenReduction. DPC-KNN: Du et al. 2016, and TCFormer, arXiv 2204.08680. K-medoids:
Marin et al., "Token Pooling in Vision Transformers", arXiv 2110.03860.

Departures: the sources cluster the input of a block. Here all methods reduce between attention and MLP, so that equal
plans have equal costs. The sources train their models with clusters of equal weight. Here a token counts once for each
of its patches in means and attention, because the models are not trained again.

Cost of a call beyond the model's multiply-accumulates: N² D for the distances (14.9 M for N = 197, D = 384, where a
block has 378 M), and (N - K) K D for the means (3.7 M for K = 98).
"""

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.reduction.gather import top_k
from evit_jax.reduction.merging import merge_groups
from evit_jax.reduction.registry import register_reducer

NEIGHBOURS = 5   # k of DPC-KNN
ITERATIONS = 3   # updates of the medoids


@register_reducer('dpcknn', merges=True)
def DPCKNN(tokens, inputs, keep):
    """Merges each token into the nearest of K centres: dense tokens, far from denser ones (TCFormer).

    Density: rho_i = exp(-mean of |x_i - x_j|² / D over the k nearest tokens j, itself included).
    Distance: delta_i = the least |x_i - x_j| over the denser tokens j; the largest distance for the densest token.
    Centres: the K tokens with the highest rho_i delta_i. Each becomes the mean over the patches of its tokens.

    The score is compared as log(rho delta), which does not underflow. Of two tokens with equal density, the first
    counts as denser; the sources add noise.
    """
    distance = _distances(tokens.patches)
    n = distance.shape[1]
    nearest = -jax.lax.top_k(-distance, min(NEIGHBOURS, n))[0]  # [B, N, k]
    log_rho = -jnp.square(nearest).mean(-1) / tokens.x.shape[-1]
    first = jnp.arange(n) < jnp.arange(n)[:, None]  # [i, j]: j is before i
    denser = (log_rho[:, None] > log_rho[:, :, None]) | (first & (log_rho[:, None] == log_rho[:, :, None]))
    delta = jnp.where(denser, distance, distance.max((1, 2), keepdims=True)).min(-1)
    centres = top_k(log_rho + jnp.log(delta), keep)
    return merge_groups(tokens, _nearest(distance, centres), centres)


@register_reducer('kmedoids', merges=True, importance='mean')
def KMEDOIDS(tokens, inputs, keep):
    """Keeps the K medoids of a hard weighted clustering; each represents the tokens nearest to it.

    Objective: sum over the tokens i of w_i |x_i - x_m(i)|, with m(i) the nearest medoid.
    Start: the K tokens with the highest weight w, the attention that a token receives (`inputs.IMPORTANCES`).
    Update: m_k = the token i of cluster k with the least sum of w_j |x_i - x_j| over the tokens j of cluster k.

    The medoids keep their activations; their size counts all patches of the cluster. The code of the comparison sums
    over all tokens j and weights by w_i; this follows the objective. The importance `mean` computes the attention again
    (N² D multiply-accumulates).
    """
    distance, weight = _distances(tokens.patches), inputs.importance
    medoids = top_k(weight, keep)
    for _ in range(ITERATIONS):
        cluster = _nearest(distance, medoids)
        together = cluster[:, :, None] == cluster[:, None]  # [B, i, j]
        cost = jnp.where(together, weight[:, None] * distance, 0).sum(-1)
        inside = cluster[:, None] == jnp.arange(keep)[:, None]  # [B, K, N]
        medoids = jnp.where(inside, cost[:, None], jnp.inf).argmin(-1).astype(jnp.int32)
    means = merge_groups(tokens, _nearest(distance, medoids), medoids)
    x = jnp.take_along_axis(tokens.patches, medoids[..., None], axis=1)
    return means.replace(x=jnp.concatenate([tokens.prefix, x], axis=1))


def _distances(x: Array) -> Array:
    """Returns the Euclidean distances between tokens, [B, N, N] float32, exactly 0 on the diagonal."""
    x = x.astype(jnp.float32)
    x = x - x.mean(axis=1, keepdims=True)  # keeps the distances, and cancels less in the difference below
    square = jnp.square(x).sum(-1)
    product = jnp.einsum('bid,bjd->bij', x, x, precision='highest')
    squared = jnp.maximum(square[:, :, None] + square[:, None] - 2 * product, 0)
    return jnp.sqrt(squared) * (1 - jnp.eye(x.shape[1]))


def _nearest(distance: Array, centres: Array) -> Array:
    """Returns the index in `centres` [B, K] of the centre nearest to each token, [B, N] int32."""
    nearest = jnp.take_along_axis(distance, centres[..., None], axis=1).argmin(1).astype(jnp.int32)
    # A centre is its own nearest, even if another centre has equal activations: no cluster is empty.
    return jax.vmap(lambda row, index: row.at[index].set(jnp.arange(len(index), dtype=jnp.int32)))(nearest, centres)
