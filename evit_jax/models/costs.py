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
    side, stem = math.isqrt(plan.patches) * config.patch_size, 0
    for convolution in config.convolutions:
        side //= convolution.stride
        stem += side * side * convolution.weights
    embedding = plan.patches * config.patch_values * config.width
    blocks = blocks_macs(plan, width=config.width, mlp_ratio=config.mlp_ratio, prefix=config.num_prefix_tokens)
    learned = sum(plan.reducer.module_macs(plan.entering[block], config.width) for block in plan.reductions)
    heads = config.num_classified(plan) * config.width * config.classes
    return stem + embedding + blocks + learned + heads


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
    whole = block_macs(attending, leaving, config.width, config.mlp_ratio)
    short = block_macs(attending, prefix, config.width, config.mlp_ratio, attending if reduces else prefix)
    return macs(config, plan) - whole + short


def block_macs(tokens_in: int, tokens_out: int, width: int, mlp_ratio: float, num_queries: int | None = None) -> int:
    """Returns the MACs of one block for one image.

    Args:
      tokens_in: number of tokens in the attention, including prefix tokens.
      tokens_out: number of tokens in the MLP, including prefix tokens.
      num_queries: see `Block`. The queries of all tokens are projected even so.
    """
    num_queries = tokens_in if num_queries is None else num_queries
    projections = (3 * tokens_in + num_queries) * width * width
    products = 2 * num_queries * tokens_in * width
    mlp = 2 * tokens_out * width * int(width * mlp_ratio)
    return projections + products + mlp


def blocks_macs(plan: TokenPlan, *, width: int, mlp_ratio: float, prefix: int = 1) -> int:
    """Returns the MACs of all blocks for one image.

    Args:
      prefix: number of prefix tokens.
    """
    return sum(block_macs(n_in + prefix, n_out + prefix, width, mlp_ratio)
               for n_in, n_out in zip(plan.attending, plan.counts, strict=True))


def parameters(config: Any, plan: TokenPlan | None = None) -> int:
    """Returns the number of parameters of a model.

    Args:
      config: a `ViTConfig`.
      plan: the learned modules of its reducer are included, one per reduction; None: no modules.
    """
    stem = sum(convolution.weights + 2 * convolution.channels_out for convolution in config.convolutions)
    prefix = config.num_prefix_tokens
    tokens = prefix + prefix + config.patches(config.image_size)  # prefix tokens, and position embeddings of all tokens
    heads = config.num_heads_of_classes * (config.width + 1) * config.classes
    blocks = config.depth * block_parameters(config.width, config.mlp_ratio, config.qkv_bias)
    learned = 0 if plan is None else len(plan.reductions) * module_parameters(plan.reducer, config.width)
    return stem + (config.patch_values + 1 + tokens + 2) * config.width + blocks + heads + learned


def block_parameters(width: int, mlp_ratio: float, qkv_bias: bool = True) -> int:
    """Returns the number of parameters of one block: two norms, attention, MLP."""
    hidden = int(width * mlp_ratio)
    attention = 4 * width * width + width + 3 * width * qkv_bias
    return 4 * width + attention + 2 * width * hidden + hidden + width


@functools.cache
def module_parameters(reducer: Reducer, width: int) -> int:
    """Returns the number of parameters of the learned module of one reduction."""
    if not reducer.is_learned:
        return 0

    def make(key):
        module = reducer.make_module(width, init_std=0.02, dtype=jnp.float32, rngs=nnx.Rngs(key))
        return nnx.to_pure_dict(nnx.state(module, nnx.Param))

    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0))))
