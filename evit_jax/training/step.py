"""The training step and the evaluation step. A token plan is static: each plan compiles its own program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from evit_jax.checkpoints.state import TrainState, trained_part, update_ema
from evit_jax.models import Model, with_statistics
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import sharding
from evit_jax.training.objectives import Objective, Targets, Taught

NONFINITE = ('stop', 'skip')  # actions for a step whose loss or gradient is not finite
FREEZE = ('', 'backbone')     # parts of the model that can be frozen; '': none


class Mixed(NamedTuple):
    """The inputs and targets of a training step."""

    images: Array     # [B, S, S, 3]
    targets: Targets
    options: dict = {}  # additional inputs of the model, by name


class UpdateRule(NamedTuple):
    """The rule by which a step changes the state of the training."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule      # update number -> learning rate, for the metrics
    ema_decay: float              # decay of the moving average of the parameters
    updates_every: int = 1        # number of steps per update of the optimizer
    skip_nonfinite: bool = False  # a step whose loss or gradient is not finite changes only the step count
    freeze: str = ''              # 'backbone': train only the heads. The backbone then computes as in evaluation,
                                  # without drop path, and saves no activations for a backward pass


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Normalises uint8 images [B, S, S, 3] to float32. `mean` and `std` of each channel are for values in 0..1."""
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def make_train_step(model: Model, rule: UpdateRule, *, prepare: Callable[[Array], Array],
                    mix: Callable[[Array, dict, Array], Mixed], objective: Callable[[TokenPlan], Objective],
                    seed: int, teach: Callable[[Any, Array], Taught] | None = None,
                    ) -> Callable[..., tuple[TrainState, dict]]:
    """Makes `step(state, batch, plan) -> (state, metrics)`. Jit it with `plan` static and the state donated.

    If there is a teacher, the step is `step(state, batch, plan, teacher_params)`.

    Args:
      prepare: uint8 images -> normalised images.
      mix: (normalised images, batch, random key) -> inputs and targets.
      objective: plan -> objective.
      seed: the random key of step s is a function of (seed, s).
      teach: (teacher parameters, images) -> teacher outputs.
    """

    def step(state: TrainState, batch: dict, plan: TokenPlan, teacher_params: Any = None) -> tuple[TrainState, dict]:
        drop_key, mix_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images, targets, options = mix(prepare(batch['image']), batch, mix_key)
        taught = teach(teacher_params, images) if teach else None
        loss_terms = objective(plan)
        trained = trained_part(state.params, rule.freeze)

        def loss_of(trained):
            logits, intermediates = model.apply(state.params | trained, images, plan, None if rule.freeze else drop_key,
                                                patch_tokens=loss_terms.reads_patch_tokens, **options)
            loss, parts = loss_terms(logits, intermediates, targets, taught)
            return loss, (logits, parts, intermediates.get('statistics', {}))

        (loss, (logits, parts, statistics)), gradient = jax.value_and_grad(loss_of, has_aux=True)(trained)
        updates, opt_state = rule.optimizer.update(gradient, state.opt_state, trained)
        params = with_statistics(state.params | optax.apply_updates(trained, updates), {'statistics': statistics})
        ema = None if state.ema is None else state.ema | update_ema(
            trained_part(state.ema, rule.freeze), trained_part(params, rule.freeze), rule.ema_decay)
        # A mixed target has two classes; the one with the larger weight counts.
        right = logits.argmax(-1) == targets.label.argmax(-1)
        metrics = {'loss': loss, **parts, 'accuracy': jnp.mean(right),
                   'grad_norm': optax.global_norm(gradient), 'lr': rule.schedule(state.step // rule.updates_every)}
        after = TrainState(state.step, params, ema, opt_state)
        if rule.skip_nonfinite:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics['grad_norm'])
            after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
        return after._replace(step=state.step + 1), metrics

    return step


def label_ranks(logits: Array, labels: Array) -> Array:
    """Counts the classes ranked before each label, [B] int32. It replaces `top_k`, which XLA cannot partition."""
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(logits.shape[1]) < labels[:, None]
    return jnp.where(earlier, ~(logits < own), ~(logits <= own)).sum(1)  # written so that NaN never counts as right


def make_eval_step(model: Model, *, prepare: Callable[[Array], Array]) -> Callable[..., dict[str, Any]]:
    """Makes `step(params, batch, plan) -> dict`. Jit it with `plan` static.

    The step returns loss, right (top-1), right5 (top-5) and prediction for each image, and the intermediates `kept` and
    `token_of_patch` of `ViT`.
    """

    def step(params: Any, batch: dict, plan: TokenPlan) -> dict[str, Any]:
        logits, intermediates = model.apply(params, prepare(batch['image']), plan)
        rank = label_ranks(logits, batch['label'])
        return {'loss': optax.softmax_cross_entropy_with_integer_labels(logits, batch['label']), 'right': rank < 1,
                'right5': rank < 5, 'prediction': logits.argmax(-1), 'kept': intermediates['kept'],
                'token_of_patch': intermediates['token_of_patch']}

    return step


@functools.lru_cache(maxsize=8)
def jit_eval_step(model: Model, mesh: Mesh, state_sharding: str, mean: tuple[float, ...],
                  std: tuple[float, ...]) -> Callable[..., dict[str, Any]]:
    """Returns the jitted evaluation step on a mesh. Equal arguments return the same step, which is compiled once.

    Args:
      state_sharding: name of the sharding of the parameters; see `sharding.state_shardings`.
      mean, std: see `normalise`.
    """
    step = make_eval_step(with_whole_params(model, mesh), prepare=functools.partial(normalise, mean=mean, std=std))
    params = sharding.state_shardings(jax.eval_shape(model.init, jax.random.key(0)), mesh, state_sharding)
    batch = sharding.batch_sharding(mesh)
    return jax.jit(sharding.with_mesh(mesh, step), static_argnums=2, in_shardings=(params, batch), out_shardings=batch)


def with_whole_params(model: Model, mesh: Mesh) -> Model:
    """Returns the model with its parameters replicated on the devices before use.

    Otherwise, XLA would communicate activations instead of sharded weights if there are few tokens.
    """

    def apply(params, *args, **kwargs):
        params = jax.lax.with_sharding_constraint(params, sharding.replicated(mesh))
        return model.apply(params, *args, **kwargs)

    return model._replace(apply=apply)
