"""The jitted steps. A token plan is static: each plan is a program of its own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from evit_jax.checkpoints.state import TrainState, update_ema
from evit_jax.models import Model, with_statistics
from evit_jax.reduction.plan import TokenPlan
from evit_jax.training.objectives import Objective, Targets, Taught

NONFINITE = ('stop', 'skip')  # what becomes of a step whose loss or gradient is not finite


class Mixed(NamedTuple):
    """What a step trains on."""

    images: Array     # [B, S, S, 3]
    targets: Targets
    asked: dict = {}  # what more the model is given, by name


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """uint8 [B, S, S, 3] to float32, with the channels' mean and deviation (of values in 0..1)."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def make_train_step(model: Model, optimizer: optax.GradientTransformation, schedule: optax.Schedule, *,
                    prepare: Callable[[Array], Array], mix: Callable[[Array, dict, Array], Mixed],
                    objective: Callable[[TokenPlan], Objective], ema_decay: float, seed: int,
                    teach: Callable[[Any, Array], Taught] | None = None, updates_every: int = 1,
                    skip_nonfinite: bool = False) -> Callable[..., tuple[TrainState, dict]]:
    """Makes `step(state, batch, plan) -> (state, metrics)`; jit it with `plan` static and the state donated.

    With a teacher it is `step(state, batch, plan, taught_by)`, with the parameters of that one.

    Args:
      prepare: uint8 images to what the model takes.
      mix: prepared images, the batch and a key to what is trained on.
      objective: of a plan.
      teach: the teacher's parameters and the images trained on to what it says of them.
      seed: all draws of step s come from (seed, s).
      updates_every: steps between two updates of the optimizer, for the reported learning rate.
      skip_nonfinite: a step whose loss or gradient is not finite changes nothing but the count of steps.
    """

    def step(state: TrainState, batch: dict, plan: TokenPlan, taught_by: Any = None) -> tuple[TrainState, dict]:
        drop_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images, targets, asked = mix(prepare(batch['image']), batch, mix_key)
        taught = teach(taught_by, images) if teach else None

        def loss_of(params):
            logits, seen = model.apply(params, images, plan, drop_key, **asked)
            loss, parts = objective(plan)(logits, seen, targets, taught)
            return loss, (logits, parts, seen.get('statistics', {}))

        (loss, (logits, parts, statistics)), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = with_statistics(optax.apply_updates(state.params, updates), {'statistics': statistics})
        ema = None if state.ema is None else update_ema(state.ema, params, ema_decay)
        right = logits.argmax(-1) == targets.label.argmax(-1)  # of two mixed classes, the one with more weight
        metrics = {'loss': loss, **parts, 'accuracy': jnp.mean(right),
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
                    {'token_of_patch': seen['token_of_patch']} if plan.reducer.merges else {})

    return step
