"""Models by name, each as pure functions over a plain tree of parameters."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViT, LVViTConfig, fold
from evit_jax.models.vit import ViT
from evit_jax.runtime.names import get_by_name

Params = dict[str, Any]

SHAPES = {
    'deit_t': ViTConfig(width=192, heads=3),
    'deit_s': ViTConfig(width=384, heads=6),
    'deit_b': ViTConfig(width=768, heads=12),
    'lvvit_t': LVViTConfig(width=240, depth=12, heads=4, residual_scale=1.0),
    'lvvit_s': LVViTConfig(width=384, depth=16, heads=6),
    'lvvit_m': LVViTConfig(width=512, depth=20, heads=8),
    'lvvit_digits': LVViTConfig(image_size=64, patch_size=8, width=64, depth=6, heads=2, classes=10, init_std=0.2,
                               stem_width=16),
    'vit_digits': ViTConfig(image_size=64, patch_size=8, width=64, depth=6, heads=2, classes=10, init_std=0.2,
                           stem=(16, 32, 64, 64)),
}

MODULES = {ViTConfig: ViT, LVViTConfig: LVViT}

# Fields of a shape that decide logits and that no array of the weights shows. Each is a key of config.model, where 0,
# '' and False mean the value of the named model.
UNSHAPED = ('heads', 'norm_epsilon', 'activation', 'pooling', 'one_head')


class Model(NamedTuple):
    """A model taken apart into what JAX works on: pure functions and a shape."""

    config: ViTConfig
    init: Callable[[Array], Params]         # key -> parameters
    apply: Callable[..., tuple[Array, dict]]  # (params, images, plan, key=, visible=, swap=) -> ViT.__call__'s


def get_config(name: str) -> ViTConfig:
    """The shape of a named model.

    Raises:
      ValueError: no such model; names the nearest.
    """
    return get_by_name('model', name, SHAPES)


def config_from_flat(config: Mapping[str, Any]) -> ViTConfig:
    """The shape of the model in a flat config; a key that is absent has the value of the named model.

    Raises:
      ValueError: no such model, or a value out of range.
    """
    values = {key: config.get(f'model.{key}') for key in ('image_size', 'classes', 'distilled', *UNSHAPED)}
    model_config = get_config(config['model.name'])
    return dataclasses.replace(model_config, **{key: value for key, value in values.items() if value})


def resolved(config: Mapping[str, Any]) -> dict[str, Any]:
    """A flat config with the values of the named model where the keys of UNSHAPED leave them open, for comparison."""
    get_reducer = SHAPES.get(config.get('model.name'))
    return dict(config) | {f'model.{key}': config.get(f'model.{key}') or getattr(get_reducer, key)
                           for key in UNSHAPED if get_reducer is not None}


def create(config: ViTConfig, *, drop_path: float = 0.0, dtype=jnp.float32, remat: bool = False,
           gather_impl: str = '') -> Model:
    """Takes a model apart once; its parameters are made by `init`. The arguments are those of `ViT`."""

    def build(key):
        return MODULES[type(config)](config, drop_path=drop_path, dtype=dtype, remat=remat, gather_impl=gather_impl,
                                    rngs=nnx.Rngs(key))

    graph = nnx.graphdef(nnx.eval_shape(build, jax.random.key(0)))

    def apply(params, images, plan, key=None, visible=None, swap=None):
        return nnx.merge(graph, params)(images, plan, key=key, visible=visible, swap=swap)

    return Model(config, jax.jit(lambda key: nnx.to_pure_dict(nnx.state(build(key), nnx.Param))), apply)


def folded(config: ViTConfig, params: Params) -> tuple[ViTConfig, Params]:
    """Shape and parameters to be served: without batch normalisation, which convolutions can do; others as they are.

    Not to be trained, nor kept: checkpoints hold what was trained.
    """
    return fold(config, params) if isinstance(config, LVViTConfig) else (config, params)


def with_statistics(params: Params, seen: dict) -> Params:
    """Parameters with the running statistics that a pass in training left in `seen`; as they were, where it left none.

    To be called after the optimizer's update, and before a moving average is taken.
    """
    return _overlaid(params, seen.get('statistics', {}))


def _overlaid(tree, part):
    if not isinstance(part, dict):
        return part
    return tree | {name: _overlaid(tree[name], below) for name, below in part.items()}
