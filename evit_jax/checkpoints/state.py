"""The training state: all arrays that a training step changes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class TrainState(NamedTuple):
    """A pytree that a training step returns anew, and that a checkpoint stores."""

    step: Array     # int32 scalar: number of steps done
    params: Any     # float32
    ema: Any        # exponential moving average of params, or None
    opt_state: Any


def create_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Returns the state before the first step; with `ema`, the average starts from the parameters."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """Returns the moving average after a step: decay * ema + (1 - decay) * params."""
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), ema, params)
