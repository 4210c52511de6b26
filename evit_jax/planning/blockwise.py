"""Runs a model block by block, so that plans share compiled programs, and the blocks that they have in common."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.models.config import ViTConfig, as_hw
from evit_jax.models.vit import random_keys
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.tokens import Tokens
from evit_jax.training.step import normalise

_CHUNK = 32              # number of images computed at a time
_STATE_BYTES = 2 * 2**30  # memory for the stored tokens of the base plan


class Outputs(NamedTuple):
    """The outputs for B images."""

    features: np.ndarray  # [B, D] float32, the input of the head
    logits: np.ndarray    # [B, L] float32; the features if there is no head


class _Step(NamedTuple):
    """The reduction of one block, as part of the key of stored tokens."""

    keep: int | None
    drop: int


class _Programs(NamedTuple):
    """The jitted functions of a model."""

    embed: Callable     # (params, images, plan) -> tokens
    block: Callable     # (params, tokens, rng, plan, index of the block) -> tokens
    classify: Callable  # (params, tokens) -> (features, logits)
    keys: Callable      # images -> random keys


@functools.lru_cache(maxsize=4)  # several searches with a model share its programs
def _make_programs(config: ViTConfig, dtype: str, size: tuple[int, int], mean: tuple[float, ...],
                   std: tuple[float, ...]) -> _Programs:
    bind = models.create(dataclasses.replace(config, depth=1), dtype=jnp.dtype(dtype)).bind

    @functools.partial(jax.jit, static_argnums=2)
    def embed(params, images, plan):
        images = normalise(images, mean, std).astype(dtype)
        return bind(params).embed(images, plan, None, None, None, {})

    @functools.partial(jax.jit, static_argnums=(3, 4))
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

    return _Programs(embed, block, classify, keys)


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
        self._base: dict[tuple[_Step, ...], list[Tokens]] = {}
        self._base_plan: TokenPlan | None = None

    @property
    def patches(self) -> int:
        """Number of patches of an image."""
        return self.config.patches(self._image_size)

    def set_base(self, plan: TokenPlan) -> None:
        """Computes the outputs of a plan and stores its tokens after each block, until memory is short."""
        self._base, self._base_plan = {}, plan
        self.outputs(plan)

    def outputs(self, plan: TokenPlan) -> Outputs:
        """Computes the outputs of all images under a plan.

        Raises:
          FloatingPointError: outputs are not finite.
        """
        steps = [_Step(keep, drop) for keep, drop in zip(plan.keep, plan.drop or (0,) * len(plan.keep), strict=True)]
        same = self._base_plan is not None and (plan.reducer, plan.fused) == (
            self._base_plan.reducer, self._base_plan.fused)
        is_base = plan == self._base_plan
        start = max((n for n in range(len(steps) + 1) if tuple(steps[:n]) in self._base), default=0) if same else 0
        results, stored = [], []
        for number, (chunk, rng) in enumerate(zip(self._chunks, self._rngs)):
            tokens = (self._base[tuple(steps[:start])][number] if start else
                      self._programs.embed(self._params[0], chunk, plan))
            for index in range(start, len(steps)):
                tokens = self._run_block(index, tokens, rng, plan, steps[index])
                if is_base:
                    stored.append((tuple(steps[:index + 1]), tokens))
            results.append(self._programs.classify(self._params[0], tokens))
        self._store(stored)
        outputs = Outputs(*(np.concatenate([np.asarray(part) for part in parts])[:self.num_images]
                            for parts in zip(*results)))
        if not np.isfinite(outputs.logits).all():
            raise FloatingPointError(f'outputs under the plan {plan} are not finite: compute in float32')
        return outputs

    def _run_block(self, index, tokens, rng, plan, step):
        depth, entering = self.config.depth, tokens.patch_ids.shape[1]
        shared = plan.reducer.same_in_all_blocks and index < depth - 1
        at = 0 if shared or (step.keep is None and index < depth - 1) else index
        keep, drop = ([value if block == at else other for block in range(depth)]
                      for value, other in ((step.keep, None), (step.drop, 0)))
        one = TokenPlan(entering, tuple(keep), plan.fused, plan.reducer, tuple(drop) if step.drop else ())
        return self._programs.block(self._params[index], tokens, rng, one, at)

    def _store(self, stored):
        for steps, tokens in stored:
            size = sum(leaf.nbytes for leaf in jax.tree.leaves((self._base, tokens)))
            if size < _STATE_BYTES:
                self._base.setdefault(steps, []).append(tokens)
        complete = {steps: chunks for steps, chunks in self._base.items() if len(chunks) == len(self._chunks)}
        self._base = complete


