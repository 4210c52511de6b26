"""Parts of a model as programs of their own, to be timed or compiled: halves of a block, reduction, end, the rest."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.models.vit import Block
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.reducers import EVIT, ReducerInputs
from evit_jax.reduction.tokens import Tokens

HALVES = 'attention', 'mlp'


class Part(NamedTuple):
    """A program that does a part of a model `times` over, each time with what the time before has left."""

    run: Callable[..., Array]
    arguments: tuple  # shapes: parameters first
    times: int = 1

    def filled(self, seed: int) -> tuple:
        """Arguments of noise, small enough for whatever they are."""
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda of: jnp.asarray(0.1 * rng.standard_normal(of.shape, np.float32), of.dtype),
                            self.arguments)


def half(config: ViTConfig, name: str, tokens: int, batch: int, dtype: str, times: int = 1) -> Part:
    """One of HALVES of a block, with all tokens that are in it."""

    def run(block, x):
        step = {'attention': lambda x: block.attend(x, None)[0], 'mlp': lambda x: block.think(x, None)}[name]
        return _again(step, x, times)

    return _of(Block, config, dtype, run, times, _tokens(config, tokens, batch, dtype))


def short_block(config: ViTConfig, tokens: int, batch: int, dtype: str, times: int = 1) -> Part:
    """The last block with all tokens that come to it, where the heads read the prefix alone."""
    prefix = config.num_prefix_tokens

    def run(block, x):
        def asked(x):
            return block.think(block.attend(x, None, rows=prefix)[0], None)

        return asked(_again(lambda x: x.at[:, :prefix].set(asked(x)), x, times - 1))

    return _of(Block, config, dtype, run, times, _tokens(config, tokens, batch, dtype))


def heads(config: ViTConfig, tokens: int, batch: int, dtype: str, times: int = 1) -> Part:
    """The last norm and the heads, with all tokens that leave the last block."""
    config = dataclasses.replace(config, depth=0)

    def run(model, x, patch):
        def logits(x):
            return model.classify(model.norm(x), Tokens(x[:, config.num_prefix_tokens:], patch), {})

        def more(x):
            return x.at[:, 0, 0].add(logits(x).mean(axis=1).astype(x.dtype))

        return logits(_again(more, x, times - 1))

    return _of(models.MODULES[type(config)], config, dtype, run, times, _tokens(config, tokens, batch, dtype),
               jax.ShapeDtypeStruct((batch, tokens - config.num_prefix_tokens), jnp.int32))


def reduction(config: ViTConfig, tokens: int, batch: int, dtype: str, fuse: bool, times: int = 1) -> Part:
    """Ranking half of the tokens and moving them, by EViT; class attention is made where attention is."""
    patches = tokens - config.num_prefix_tokens

    def reduced(x, class_row):
        patch = jnp.broadcast_to(jnp.arange(patches, dtype=jnp.int32), (batch, patches))
        evidence = ReducerInputs(class_row, None, None, None, training=False)
        return EVIT.reduce(Tokens(x, patch), evidence, -(-patches // 2), 0 if fuse else None).x

    def run(params, x, class_row):
        def step(state):  # the scores follow from what was kept
            kept, class_row = state
            return reduced(x, class_row + kept[:, -1, :1]), class_row

        return _again(step, (reduced(x, class_row), class_row), times - 1)[0]

    return Part(run, ({}, _tokens(config, tokens, batch, dtype), jax.ShapeDtypeStruct((batch, patches), jnp.float32)),
                times)


def whole(config: ViTConfig, image_size: int, batch: int, dtype: str, depth: int | None = None) -> Part:
    """The dense model on normalised images; with a depth of 0, what is outside the blocks."""
    config = config if depth is None else dataclasses.replace(config, depth=depth)
    model = models.create(config, dtype=jnp.dtype(dtype))
    plan = make_plan(config.patches(image_size), config.depth, reduce_at=())
    images = jax.ShapeDtypeStruct((batch, image_size, image_size, 3), jnp.float32)
    return Part(lambda params, images: model.apply(params, images, plan)[0],
                (jax.eval_shape(model.init, jax.random.key(0)), images))


def _of(module, shape, dtype, run, times, *arguments):
    """A part that runs a module, `run(module, *arguments)`."""

    def build(key):
        return module(shape, drop_path=0.0, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))
    params = jax.eval_shape(lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param)), jax.random.key(0))
    return Part(lambda params, *arguments: run(nnx.merge(graph, params), *arguments), (params, *arguments), times)


def _again(step, state, times):
    """A loop, since it is compiled once; no loop of one turn, which hides from the compiler's estimate."""
    if times <= 1:
        return step(state) if times else state
    return jax.lax.fori_loop(0, times, lambda _, state: step(state), state)


def _tokens(config, tokens, batch, dtype):
    return jax.ShapeDtypeStruct((batch, tokens, config.width), dtype)
