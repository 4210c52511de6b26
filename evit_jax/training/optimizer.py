"""AdamW with DeiT's weight decay mask and learning-rate schedule.

Source: DeiT, table 9; timm 0.4.12, `optim_factory.py` and `cosine_lr.py`.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from evit_jax.reduction.reducer import PARAMS as REDUCER

_NO_DECAY = ('cls_token', 'dist_token', 'reg_token', 'pos_embed', 'latent')


def decays(params: Any) -> Any:
    """Returns a tree of bools: True for parameters with weight decay.

    Matrices and kernels have weight decay. Biases, other 1-D parameters (norms, LayerScale), prefix tokens,
    position embeddings and the query of an attention pool do not.
    """
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaf.ndim > 1 and path[-1].key not in _NO_DECAY, params)


def backbone(params: Any) -> Any:
    """Returns a tree of bools: True for all parameters except the learned parameters of a reducer."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path[0].key != REDUCER, params)


def learning_rate(*, lr: float, batch_size: int, total_steps: int, warmup_steps: int, warmup_lr: float,
                  min_lr: float, begun_at: float = 0) -> optax.Schedule:
    """Returns the schedule: a linear warm-up, then a cosine. Both are functions of the absolute step.

    A departure from the reference: the rate is updated at every step. The reference updates it once after each epoch,
    so epoch e + 1 uses the value that this curve has at epoch e.

    Args:
      lr: base learning rate for a batch of 512, scaled linearly with the batch size. `warmup_lr` and `min_lr` are not
        scaled.
      begun_at: point of the curve at step 0. It is not 0 if the batch size has changed, because the step count goes on.
    """
    peak = lr * batch_size / 512

    def schedule(step):
        step = step + begun_at if begun_at else step
        warm = warmup_lr + (peak - warmup_lr) * step / max(warmup_steps, 1)
        left = jnp.maximum(total_steps - step, 0) / total_steps
        cosine = jnp.sin(math.pi / 2 * left) ** 2  # (1 + cos(pi * (1 - left))) / 2, without cancellation in float32
        return jnp.where(step < warmup_steps, warm, min_lr + (peak - min_lr) * cosine)

    return schedule


def adamw(schedule: optax.Schedule, *, weight_decay: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
          clip_norm: float = 0.0, accumulate: int = 1, backbone_scale: float = 1.0,
          backbone_from: int = 0) -> optax.GradientTransformation:
    """Returns AdamW with weight decay for the parameters selected by `decays`.

    Args:
      clip_norm: maximal global norm of the gradient; 0: no clipping.
      accumulate: number of steps whose gradients are averaged into one update. The schedule then counts updates.
      backbone_scale: learning-rate factor for all parameters outside the reducer (DynamicViT).
      backbone_from: number of updates for which these parameters are frozen; their moments are updated even so.
    """
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    steps.append(optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays))
    if backbone_scale != 1 or backbone_from:
        steps.append(optax.masked(optax.scale_by_schedule(
            lambda count: jnp.where(count < backbone_from, 0.0, backbone_scale)), backbone))
    chain = optax.chain(*steps)
    return optax.MultiSteps(chain, accumulate).gradient_transformation() if accumulate > 1 else chain


def from_config(config: Mapping[str, Any], *, total_steps: int, steps_per_epoch: float,
                begun_at: float) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of a flat config and the learning-rate schedule.

    Args:
      total_steps: number of steps in a run with this batch size from the start.
      begun_at: position of step 0 in the data, in steps of this batch size; see `positions`.
    """
    updates = config['optimizer.accumulate']  # number of steps per update
    warmup_lr, min_lr = config['optimizer.warmup_lr'], config['optimizer.min_lr']
    schedule = learning_rate(
        lr=config['optimizer.lr'], batch_size=config['batch_size'] * updates, warmup_lr=warmup_lr, min_lr=min_lr,
        total_steps=max(total_steps // updates, 1), begun_at=begun_at / updates,
        warmup_steps=round(config['optimizer.warmup_epochs'] * steps_per_epoch / updates))
    # If the config sets it, it is not 0: the optimizer then has a state for it during the whole run.
    if backbone_from := round(config['optimizer.backbone_from_epoch'] * steps_per_epoch / updates):
        backbone_from = (backbone_from - round(begun_at / updates)) or -1
    optimizer = adamw(
        schedule, weight_decay=config['optimizer.weight_decay'], b2=config['optimizer.b2'],
        clip_norm=config['optimizer.clip_norm'], accumulate=updates,
        backbone_scale=config['optimizer.backbone_scale'], backbone_from=backbone_from)
    return optimizer, schedule
