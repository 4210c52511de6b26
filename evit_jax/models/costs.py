"""Computes the multiply-accumulates (MACs) and parameters of a model from its config and a token plan.

MACs are counted as in the papers' tables: the matrix products of attention are included. The class-attention row, the
top-k and the fused token of a reduction are not (below 0.01 %).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducer import Reducer


def macs(config: Any, plan: TokenPlan) -> int:
    """Returns the MACs of one image under a plan.

    The last block counts every token that enters it, even if the head reads only prefix tokens; see `executed_macs`.

    Args:
      config: a `ViTConfig`.
    """
    pixels, stem = plan.patches * config.patch_size**2, 0
    for convolution in config.convolutions:
        pixels //= convolution.stride**2
        stem += pixels * convolution.weights
    embedding = plan.patches * config.patch_values * config.width
    prefix = config.num_prefix_tokens
    blocks = sum(block_macs(n_in + prefix, n_out + prefix, config.width, mlp_macs(config))
                 for n_in, n_out in zip(plan.attending, plan.counts, strict=True))
    learned = sum(plan.reducer.module_macs(plan.entering[block], config.width, plan.keep[block])
                  for block in plan.reductions)
    pool = pool_macs(config, plan.counts[-1]) if config.pooling == 'map' else 0
    heads = config.num_classified(plan) * config.head_width * config.classes
    return stem + embedding + blocks + learned + pool + heads


def executed_macs(config: Any, plan: TokenPlan) -> int:
    """Returns the MACs needed to compute the logits of one image.

    If the heads read only prefix tokens, the last block computes only their outputs. If this block also reduces between
    attention and MLP, its attention still needs all tokens as queries; only the MLP is smaller.
    """
    if config.head_reads_patches or not config.depth:
        return macs(config, plan)
    prefix = config.num_prefix_tokens
    attending, leaving = plan.attending[-1] + prefix, plan.counts[-1] + prefix
    reduces = plan.keep[-1] is not None and not plan.reducer.before_block
    whole = block_macs(attending, leaving, config.width, mlp_macs(config))
    short = block_macs(attending, prefix, config.width, mlp_macs(config), attending if reduces else prefix)
    return macs(config, plan) - whole + short


def block_macs(tokens_in: int, tokens_out: int, width: int, mlp: int, num_queries: int | None = None) -> int:
    """Returns the MACs of one block for one image.

    Args:
      tokens_in: number of tokens in the attention, including prefix tokens.
      tokens_out: number of tokens in the MLP, including prefix tokens.
      mlp: MACs of the MLP for one token; see `mlp_macs`.
      num_queries: see `Block`. The queries of all tokens are projected even so.
    """
    num_queries = tokens_in if num_queries is None else num_queries
    projections = (3 * tokens_in + num_queries) * width * width
    products = 2 * num_queries * tokens_in * width
    return projections + products + tokens_out * mlp


def mlp_macs(config: Any) -> int:
    """Returns the MACs of the MLP of a block for one token."""
    return (3 if config.swiglu else 2) * config.width * config.mlp_hidden


def head_macs(config: Any) -> int:
    """Returns the MACs of the heads for one patch token that leaves the last block."""
    pool = pool_macs(config, 1) - pool_macs(config, 0) if config.pooling == 'map' else 0
    return pool + config.has_token_head * config.width * config.classes


def pool_macs(config: Any, tokens: int) -> int:
    """Returns the MACs of attention pooling for one image with this number of patch tokens."""
    width, hidden = config.width, config.mlp_hidden
    return 2 * tokens * width * width + 2 * tokens * width + 2 * width * width + 2 * width * hidden


def parameters(config: Any, plan: TokenPlan | None = None) -> int:
    """Returns the number of parameters of a model.

    Args:
      config: a `ViTConfig`.
      plan: the learned modules of its reducer are included, one per reduction; None: no modules.
    """
    stem = sum(convolution.weights + 2 * convolution.channels_out for convolution in config.convolutions)
    width, tokens = config.width, config.num_prefix_tokens
    if config.absolute_positions:
        tokens += config.num_prefix_positions + config.patches(config.image_size)
    embedding = (config.patch_values + config.patch_bias + tokens) * width
    norms = 2 * width * (1 + config.pre_norm)
    pool = _pool_parameters(config) if config.pooling == 'map' else 0
    heads = config.num_heads_of_classes * (config.head_width + config.head_bias) * config.classes
    learned = 0 if plan is None else sum(module_parameters(plan.reducer, width, keep) for keep in plan.tokens)
    return stem + embedding + norms + config.depth * block_parameters(config) + pool + heads + learned


def block_parameters(config: Any) -> int:
    """Returns the number of parameters of one block: two norms, attention, MLP, and LayerScale if there is one."""
    width, hidden = config.width, config.mlp_hidden
    biases = (2 + config.k_bias) * width if config.qkv_bias else 0
    head_norms = 4 * (width // config.heads) if config.qk_norm else 0
    attention = 4 * width * width + width + biases + head_norms
    fc1 = (width + 1) * hidden * (2 if config.swiglu else 1)
    mlp = fc1 + 2 * hidden * config.mlp_norm + (hidden + 1) * width
    return 4 * width + attention + mlp + 2 * width * (config.layer_scale != 0)


def _pool_parameters(config):
    width, hidden = config.width, config.mlp_hidden
    attention = width + 4 * (width + 1) * width
    return attention + 2 * width + (width + 1) * hidden + (hidden + 1) * width


@functools.cache
def module_parameters(reducer: Reducer, width: int, keep: int) -> int:
    """Returns the number of parameters of the learned module of one reduction, which keeps `keep` tokens."""
    if not reducer.is_learned:
        return 0

    def make(key):
        module = reducer.make_module(width, keep=keep, init_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0))))
