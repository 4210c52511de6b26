"""Runs a model block by block, so that plans share compiled programs, and the blocks that they have in common."""

import copy
import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.models import Params
from evit_jax.models.config import ViTConfig, as_hw
from evit_jax.models.vit import random_keys
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.tokens import Tokens
from evit_jax.training.step import normalise

_CHUNK = 32              # number of images computed at a time
_STATE_BYTES = 2 * 2**30  # memory for the stored tokens of the base plan
# Largest number of compiled blocks. On a CPU each of them takes about 120 memory mappings, and Linux allows a process
# 65,530 by default; the process aborts beyond that.
_MOST_PROGRAMS = 256


class Outputs(NamedTuple):
    """The outputs for B images."""

    features: np.ndarray  # [B, D] float32, the input of the head
    logits: np.ndarray    # [B, L] float32; the features if there is no head


class _Programs:
    """The jitted functions of a model. Several searches with a model share them."""

    def __init__(self, config: ViTConfig, dtype: str, size: tuple[int, int], mean: tuple[float, ...],
                 std: tuple[float, ...]):
        bind = models.create(dataclasses.replace(config, depth=1), dtype=jnp.dtype(dtype)).bind

        @functools.partial(jax.jit, static_argnums=2)
        def embed(params, images, reducer):
            images = normalise(images, mean, std).astype(dtype)
            dense = TokenPlan(config.patches(size), (None,) * config.depth, False, reducer)
            return bind(params).embed(images, dense, None, None, None, {})

        @functools.partial(jax.jit, static_argnums=(3, 4), compiler_options=_compiler_options())
        def block(params, tokens, rng, plan, index):
            module = bind(params)
            reductions = module.reductions(plan, rng, size)
            prefix_only = index == config.depth - 1 and not config.head_reads_patches
            tokens = module.blocks[0](reductions.before_block(index, tokens), reductions.in_block(index),
                                      num_queries=config.num_prefix_tokens if prefix_only else None)
            shared = plan.reducer.same_in_all_blocks
            return tokens.replace(stage=0, scores=None) if shared else tokens

        @jax.jit
        def classify(params, tokens):
            module, outputs = bind(params), {}
            logits = module.classify(tokens.replace(x=module.norm(tokens.x)), outputs)
            return outputs['features'], logits

        @jax.jit
        def keys(images):
            return random_keys(normalise(images, mean, std), None)

        self.embed, self.classify, self.keys, self._block = embed, classify, keys, block
        self._compiled: set[tuple[TokenPlan, int]] = set()  # the arguments for which `block` is compiled

    def block(self, params: Params, tokens: Tokens, rng: Array, plan: TokenPlan, index: int) -> Tokens:
        """Computes block `index` of a plan; `params` are those of a model of one block."""
        if (plan, index) not in self._compiled and len(self._compiled) >= _MOST_PROGRAMS:
            self.free()
        self._compiled.add((plan, index))
        return self._block(params, tokens, rng, plan, index)

    def free(self) -> None:
        """Frees the compiled blocks. They are compiled again when they are needed."""
        self._compiled.clear()
        self._block.clear_cache()


def _compiler_options() -> dict[str, bool]:
    """Returns options that halve the compile time on a CPU, at equal speed. A search compiles hundreds of blocks."""
    return {'xla_cpu_use_fusion_emitters': False} if jax.default_backend() == 'cpu' else {}


_make_programs = functools.lru_cache(maxsize=4)(_Programs)


class BlockwiseModel:
    """A model that computes fixed images under many plans.

    A block is compiled once for each number of tokens that enter and leave. All blocks share the program if the reducer
    is the same in all blocks (`Reducer.same_in_all_blocks`). Plans that begin as the base plan (`set_base`) continue
    from its stored tokens. Learned reducers are not supported.
    """

    def __init__(self, model: LoadedModel, images: np.ndarray):
        """Puts parameters and images on the first local device.

        Args:
          images: [B, H, W, 3] uint8, of the model's image size.
        """
        model = model.fold_batchnorm()
        self.config, self._image_size = model.config, as_hw(model.image_size)
        device = jax.local_devices()[0]
        params = jax.device_put({name: value for name, value in model.params.items() if name != 'reducer'}, device)
        self._params = [params | {'blocks': {0: block}} for block in params['blocks'].values()]
        self._programs = _make_programs(model.config, model.dtype, self._image_size, tuple(model.mean),
                                        tuple(model.std))
        self._put(images)

    def for_images(self, images: np.ndarray) -> 'BlockwiseModel':
        """Returns a model for other images, which shares the compiled programs."""
        other = copy.copy(self)
        other._put(images)
        return other

    def _put(self, images):
        self.num_images = len(images)
        padding = -len(images) % _CHUNK
        padded = images[np.arange(len(images) + padding) % len(images)]
        device = jax.local_devices()[0]
        self._chunks = [jax.device_put(chunk, device) for chunk in np.split(padded, len(padded) // _CHUNK)]
        self._rngs = [self._programs.keys(chunk) for chunk in self._chunks]
        self._base: TokenPlan | None = None
        self._stored: dict[int, list[Tokens]] = {}  # number of blocks -> tokens of each chunk after these blocks

    def free_programs(self) -> None:
        """Frees the compiled blocks. They are compiled again when they are needed."""
        self._programs.free()

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.config.patches(self._image_size)

    def set_base(self, plan: TokenPlan) -> None:
        """Stores the tokens of a plan after each block. The last blocks are left out if memory is short."""
        blocks = self._shared_blocks(plan)
        stored = {number: tokens for number, tokens in self._stored.items() if number <= blocks}
        chunks = stored.get(blocks) or self._embedded(plan.reducer)
        for index in range(blocks, self.config.depth):
            chunks = [self._run_block(index, tokens, rng, plan) for tokens, rng in zip(chunks, self._rngs)]
            if sum(leaf.nbytes for leaf in jax.tree.leaves((stored, chunks))) > _STATE_BYTES:
                break
            stored[index + 1] = chunks
        self._base, self._stored = plan, stored

    def outputs(self, plan: TokenPlan) -> Outputs:
        """Computes the outputs of all images under a plan.

        Raises:
          FloatingPointError: outputs are not finite.
        """
        blocks = max((number for number in self._stored if number <= self._shared_blocks(plan)), default=0)
        results = []
        for tokens, rng in zip(self._stored[blocks] if blocks else self._embedded(plan.reducer), self._rngs):
            for index in range(blocks, self.config.depth):
                tokens = self._run_block(index, tokens, rng, plan)
            results.append(self._programs.classify(self._params[0], tokens))
        outputs = Outputs(*(np.concatenate([np.asarray(part) for part in parts])[:self.num_images]
                            for parts in zip(*results)))
        if not np.isfinite(outputs.logits).all():
            raise FloatingPointError(f'outputs under the plan {plan} are not finite: compute in float32')
        return outputs

    def _embedded(self, reducer):
        """Yields the tokens of each chunk before the first block."""
        for chunk in self._chunks:
            yield self._programs.embed(self._params[0], chunk, reducer)

    def _shared_blocks(self, plan: TokenPlan) -> int:
        """Returns the number of first blocks that a plan has in common with the base plan."""
        base = self._base
        if base is None or (plan.reducer, plan.fused) != (base.reducer, base.fused):
            return 0
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(_steps(plan), _steps(base))))

    def _run_block(self, index, tokens, rng, plan):
        depth, entering = self.config.depth, tokens.patch_ids.shape[1]
        keep, drop = _steps(plan)[index]
        shared = plan.reducer.same_in_all_blocks and index < depth - 1
        at = 0 if shared or (keep is None and index < depth - 1) else index
        keeps, drops = ([value if block == at else other for block in range(depth)]
                        for value, other in ((keep, None), (drop, 0)))
        one = TokenPlan(entering, tuple(keeps), plan.fused, plan.reducer, tuple(drops) if drop else ())
        return self._programs.block(self._params[index], tokens, rng, one, at)


def _steps(plan):
    """Returns the number of kept and dropped tokens of each block."""
    return list(zip(plan.keep, plan.drop or (0,) * len(plan.keep), strict=True))
