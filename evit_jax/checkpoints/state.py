"""The training state: all arrays that a training step updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

HEADS = ('head', 'head_dist', 'aux_head')  # top-level names of the parameters of classification heads


class TrainState(NamedTuple):
    """The state that a training step updates and a checkpoint stores; a pytree."""

    step: Array     # int32 scalar: number of completed steps
    params: Any     # float32
    ema: Any        # exponential moving average (EMA) of params, or None
    opt_state: Any  # optimizer state of the parameters in `trained_part`


def create_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool, freeze: str = '') -> TrainState:
    """Returns the state before the first step. If `ema`, the EMA starts as a copy of the parameters.

    Args:
      freeze: see `trained_part`.
    """
    initial_ema = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, initial_ema, optimizer.init(trained_part(params, freeze)))


def trained_part(params: dict[str, Any], freeze: str) -> dict[str, Any]:
    """Returns the parameters that are trained.

    Args:
      freeze: 'backbone': only the heads are trained; '': all parameters.
    """
    return {name: leaf for name, leaf in params.items() if not freeze or name in HEADS}


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Returns the EMA after a step: decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), ema, params)
