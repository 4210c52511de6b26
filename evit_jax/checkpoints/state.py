"""Everything that training changes, as one tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array


class TrainState(NamedTuple):
    """A pytree: what a checkpoint holds and a step returns anew."""

    step: Array     # int32: steps done
    params: Any     # float32
    ema: Any        # moving average of params, or None
    opt_state: Any


def create_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """The state before the first step."""
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def update_ema(ema: Any, params: Any, decay: float) -> Any:
    """The moving average after a step; its memory is 1 / (1 - decay) steps, until then it holds the initial weights."""
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), ema, params)
