"""A model as pure functions over a plain tree of parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import Array

from evit_jax.models import lvvit
from evit_jax.models.config import ViTConfig
from evit_jax.models.vit import ViT
from evit_jax.reduction.reducer import NO_MODULES, Modules

Params = dict[str, Any]
_CLASSES = {ViTConfig: ViT, lvvit.LVViTConfig: lvvit.LVViT}


class _CountedKeys(nnx.RngStream):
    """A stream of the keys of `nnx.RngStream`, with a counter that is a Python number.

    The traced counter of `nnx.RngStream` makes the time to trace a model quadratic in the number of its parameters.
    """

    def __init__(self, key: Array, *, tag: str = 'default'):
        super().__init__(key, tag=tag)
        self.drawn = 0

    def __call__(self) -> Array:
        self.drawn += 1
        return jax.random.fold_in(self.key[...], self.drawn - 1)


class Model(NamedTuple):
    """A model as pure functions; its parameters are a tree of arrays."""

    config: ViTConfig
    init: Callable[[Array], Params]           # random key -> parameters
    apply: Callable[..., tuple[Array, dict]]  # (params, images, plan, **options) -> result of ViT.__call__
    modules: Modules = NO_MODULES             # the learned modules of the reducer
    bind: Callable[[Params], ViT] | None = None  # parameters -> the Flax module with them


@functools.lru_cache(maxsize=32)
def create(config: ViTConfig, **options: Any) -> Model:
    """Creates a model. Equal arguments return the same model, so that its functions are traced and compiled once.

    Args:
      options: keyword arguments of `ViT`: drop_path, dtype, remat, gather_impl, modules.
    """

    def build(key):
        rngs = nnx.Rngs()
        rngs.default = _CountedKeys(key)
        return _CLASSES[type(config)](config, rngs=rngs, **options)

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))

    def init(key):
        return nnx.to_pure_dict(nnx.state(build(key), nnx.Param))

    def bind(params):
        return nnx.merge(graph, params)

    def apply(params, images, plan, key=None, **inputs):
        return bind(params)(images, plan, key=key, **inputs)

    return Model(config, jax.jit(init), apply, options.get('modules', NO_MODULES), bind)


def fold_batchnorm(config: ViTConfig, params: Params) -> tuple[ViTConfig, Params]:
    """Folds batch normalisation into convolutions, for inference. Returns a config and parameters.

    A model without batch normalisation is returned unchanged. Checkpoints and training use the unfolded parameters.
    """
    return lvvit.fold_batchnorm(config, params) if isinstance(config, lvvit.LVViTConfig) else (config, params)


def with_statistics(params: Params, intermediates: dict) -> Params:
    """Returns parameters with the running statistics from the intermediates of a training step, if any.

    Call it after the optimizer's update and before the EMA update.
    """
    return _overlay(params, intermediates.get('statistics', {}))


def _overlay(tree, part):
    if not isinstance(part, dict):
        return part
    return tree | {name: _overlay(tree[name], below) for name, below in part.items()}
