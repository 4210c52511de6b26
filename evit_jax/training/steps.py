"""The jitted steps. A token plan is static: each plan is a program of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from evit_jax.models import Model
from evit_jax.tokens.plan import TokenPlan
from evit_jax.training import losses
from evit_jax.training.state import TrainState, average

NONFINITE = ('stop', 'skip')  # what becomes of a step whose loss or gradient is not finite


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 [B, S, S, 3] to float32, with the channels' mean and deviation (of values in 0..1)."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def make_train_step(model: Model, optimizer: optax.GradientTransformation, schedule: optax.Schedule, *,
                    prepare: Callable[[Array], Array], mix: Callable[[Array, Array, Array], tuple[Array, Array]],
                    ema_decay: float, seed: int, updates_every: int = 1,
                    skip_nonfinite: bool = False) -> Callable[..., tuple[TrainState, dict]]:
    """Makes `step(state, batch, plan) -> (state, metrics)`; jit it with `plan` static and the state donated.

    Args:
      prepare: uint8 images to what the model takes.
      mix: prepared images, labels and a key to the images trained on and their targets [B, L].
      seed: all draws of step s come from (seed, s).
      updates_every: steps between two updates of the optimizer, for the reported learning rate.
      skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the count of steps.
    """

    def step(state: TrainState, batch: dict, plan: TokenPlan) -> tuple[TrainState, dict]:
        drop_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images, targets = mix(prepare(batch['image']), batch['label'], mix_key)

        def loss_of(params):
            logits, _ = model.apply(params, images, plan, drop_key)
            return losses.cross_entropy(logits, targets), logits

        (loss, logits), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = None if state.ema is None else average(state.ema, params, ema_decay)
        right = logits.argmax(-1) == targets.argmax(-1)  # of two mixed classes, the one with more weight
        metrics = {'loss': loss, 'accuracy': jnp.mean(right),
                   'grad_norm': optax.global_norm(gradient), 'lr': schedule(state.step // updates_every)}
        after = TrainState(state.step, params, ema, opt_state)
        if skip_nonfinite:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics['grad_norm'])
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after._replace(step=state.step + 1), metrics

    return step


def places(logits: Array, labels: Array) -> Array:
    """How many classes come before each label's, [B] int32: as in `top_k`, which XLA does not divide among devices."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    return jnp.where(earlier, ~(logits < own), ~(logits <= own)).sum(1)  # so put, NaN is never right


def make_eval_step(model: Model, *, prepare: Callable[[Array], Array]) -> Callable[..., dict[str, Any]]:
    """Makes `step(params, batch, plan) -> dict`; jit it with `plan` static.

    It returns, per image: loss, right (top-1), right5 (top-5), prediction, and kept: per reduction [B, K] patch ids;
    where the plan's reducer merges, home too: per reduction [B, N], of each patch the number of its token.
    """

    def step(params: Any, batch: dict, plan: TokenPlan) -> dict[str, Any]:
        logits, seen = model.apply(params, prepare(batch['image']), plan)
        place = places(logits, batch['label'])
        return {'loss': optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), 'right': place < 1,
                'right5': place < 5, 'prediction': logits.argmax(-1), 'kept': seen['kept']} | (
                    {'home': seen['home']} if plan.reducer.merges else {})

    return step
