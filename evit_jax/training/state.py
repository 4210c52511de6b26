"""Everything that training changes, as one tree."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from evit_jax.models import Model


class TrainState(NamedTuple):
    """A pytree: what a checkpoint holds and a step returns anew."""

    step: Array     # int32: steps done
    params: Any     # float32
    ema: Any        # moving average of params, or None
    opt_state: Any


def create_state(model: Model, optimizer: optax.GradientTransformation, key: Array, *, ema: bool) -> TrainState:
    """The state before the first step."""
    params = model.init(key)
    average = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, average, optimizer.init(params))


def average(ema: Any, params: Any, decay: float, step: Array) -> Any:
    """The moving average after a step; it forgets faster in the first steps, while its memory is short.

    (A departure: the reference keeps the initial weights in at full decay. For long runs both agree.)
    """
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: old * decay + new * (1 - decay), ema, params)
