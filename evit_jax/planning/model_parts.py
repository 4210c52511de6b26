"""Creates programs of model parts: the branches of a block, a reduction, the heads. They are timed or compiled."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from evit_jax import models
from evit_jax.kernels.attention import AttentionOutput
from evit_jax.models.config import ImageSize, ViTConfig, as_hw
from evit_jax.models.lvvit import LVViT, LVViTConfig
from evit_jax.models.vit import Block, ViT
from evit_jax.reduction.inputs import ModelInputs, ReducerInputs
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.reduction.registry import get_reducer
from evit_jax.reduction.tokens import Tokens

BRANCHES = 'attention', 'mlp'


class ModelPart(NamedTuple):
    """A program that applies a part of a model `repeats` times, each time to the previous output."""

    run: Callable[..., Array]
    arguments: tuple  # shapes and dtypes of the arguments; parameters come first
    repeats: int = 1

    def random_arguments(self, seed: int) -> tuple:
        """Returns arguments that hold small Gaussian noise."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda array: jnp.asarray(0.1 * rng.standard_normal(array.shape, np.float32), array.dtype),
                            self.arguments)


def branch(config: ViTConfig, name: str, tokens: int, batch: int, dtype: str, repeats: int = 1) -> ModelPart:
    """Returns one branch of a block.

    Args:
      name: one of BRANCHES.
      tokens: number of tokens in the block, including prefix tokens.
    """

    def run(block, x):
        def step(x):
            output = block.attn(block.norm1(x)).out if name == 'attention' else block.mlp(block.norm2(x))
            return x + block.scale * output

        return _repeat(step, x, repeats)

    return _module_part(Block, config, dtype, run, repeats, _tokens(config, tokens, batch, dtype))


def last_block(config: ViTConfig, tokens: int, batch: int, dtype: str, repeats: int = 1) -> ModelPart:
    """Returns the last block of a model whose heads read only the prefix tokens.

    Args:
      tokens: number of tokens that enter the block, including prefix tokens.
    """
    prefix = config.num_prefix_tokens

    def run(block, x):
        def prefix_outputs(x):
            return block(_as_tokens(x, config), num_queries=prefix).x

        return prefix_outputs(_repeat(lambda x: x.at[:, :prefix].set(prefix_outputs(x)), x, repeats - 1))

    return _module_part(Block, config, dtype, run, repeats, _tokens(config, tokens, batch, dtype))


def heads(config: ViTConfig, tokens: int, batch: int, dtype: str, repeats: int = 1) -> ModelPart:
    """Returns the last norm and the heads.

    Args:
      tokens: number of tokens that leave the last block, including prefix tokens.
    """
    config = dataclasses.replace(config, depth=0)

    def run(model, x, patch_ids):
        def logits(x):
            return model.classify(Tokens(model.norm(x), patch_ids), {})

        def feed_back(x):
            return x.at[:, 0, 0].add(logits(x).mean(axis=1).astype(x.dtype))

        return logits(_repeat(feed_back, x, repeats - 1))

    module = LVViT if isinstance(config, LVViTConfig) else ViT
    return _module_part(module, config, dtype, run, repeats, _tokens(config, tokens, batch, dtype),
                        jax.ShapeDtypeStruct((batch, tokens - config.num_prefix_tokens), jnp.int32))


def reduction(config: ViTConfig, tokens: int, batch: int, dtype: str, reducer: str, fuse: bool,
              repeats: int = 1) -> ModelPart:
    """Returns a reduction: to half of the patches, or of a reducer that merges, by one eighth.

    It includes all that the reducer reads of queries, keys and values. Class attention is not included; it belongs to
    the attention branch.

    Args:
      tokens: number of tokens that enter the reduction, including prefix tokens.
      reducer: name of the reducer.
    """
    reducer, patches, prefix = get_reducer(reducer), tokens - config.num_prefix_tokens, config.num_prefix_tokens
    keep = patches - max(patches // 8, 1) if reducer.merges and patches > 1 else -(-patches // 2)

    plan = TokenPlan(patches, (keep,) + (None,) * (config.depth - 1), fuse and reducer.can_fuse, reducer)

    def reduced(x, class_attention, qkv):
        before = reducer.prepare(_as_tokens(x, config))
        size = None if before.size is None else jnp.pad(before.size, ((0, 0), (prefix, 0)), constant_values=1)
        attention = AttentionOutput(x, class_attention, qkv, size, config.heads)
        rng = jax.random.split(jax.random.key(0), batch)
        inputs = ReducerInputs(before, attention, plan, 0, rng, ModelInputs(
            has_class_token=config.class_token, grid=config.grid()))
        return reducer.reduce(before, inputs, keep).x

    def run(params, *inputs):
        def step(state):  # feeds the output back into the inputs, so that XLA cannot hoist the repetition
            kept, x, class_attention, qkv = state
            change = kept[:, -1, 0]
            inputs = x.at[:, -1, 0].add(change), class_attention.at[:, -1].add(change), qkv.at[:, -1, 0].add(change)
            return reduced(*inputs), *inputs

        return _repeat(step, (reduced(*inputs), *inputs), repeats - 1)[0]

    scores = jax.ShapeDtypeStruct((batch, tokens), jnp.float32)
    qkv = jax.ShapeDtypeStruct((batch, tokens, 3 * config.width), jnp.dtype(dtype))
    return ModelPart(run, ({}, _tokens(config, tokens, batch, dtype), scores, qkv), repeats)


def whole_model(config: ViTConfig, image_size: ImageSize, batch: int, dtype: str,
                depth: int | None = None, plan: TokenPlan | None = None) -> ModelPart:
    """Returns the whole model, applied to normalised images.

    Args:
      depth: number of blocks. 0 leaves only the parts outside the blocks; None uses the depth of the model.
      plan: None: dense.
    """
    config = config if depth is None else dataclasses.replace(config, depth=depth)
    model = models.create(config, dtype=jnp.dtype(dtype))
    plan = plan or make_plan(config.patches(image_size), config.depth, reduce_at=())
    images = jax.ShapeDtypeStruct((batch, *as_hw(image_size), 3), jnp.float32)
    return ModelPart(lambda params, images: model.apply(params, images, plan)[0],
                     (jax.eval_shape(model.init, jax.random.key(0)), images))


def _module_part(module, config, dtype, run, repeats, *arguments):
    """Returns the model part that calls `run(module, *arguments)`."""

    def build(key):
        return module(config, drop_path=0.0, dtype=jnp.dtype(dtype), remat=False, rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))
    params = jax.eval_shape(lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param)), jax.random.key(0))
    return ModelPart(lambda params, *arguments: run(nnx.merge(graph, params), *arguments), (params, *arguments),
                     repeats)


def _repeat(step, state, repeats):
    """Applies `step` repeatedly. A loop compiles the step once. The compiler gives no estimate for a loop, so a single
    step is applied without one.
    """
    if repeats <= 1:
        return step(state) if repeats else state
    return jax.lax.fori_loop(0, repeats, lambda _, state: step(state), state)


def _as_tokens(x, config):
    """Converts activations [B, F + N, D] to `Tokens` with the ids of the first N patches."""
    batch, patches = x.shape[0], x.shape[1] - config.num_prefix_tokens
    patch_ids = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches))
    return Tokens(x, patch_ids)


def _tokens(config, tokens, batch, dtype):
    return jax.ShapeDtypeStruct((batch, tokens, config.width), dtype)
