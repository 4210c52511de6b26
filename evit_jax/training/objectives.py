"""What a training makes less: an objective is a value, the sum of named parts by their weights."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from evit_jax.data.token_labels.mixtoken import Sparse
from evit_jax.training import losses


class Targets(NamedTuple):
    """What a batch is to be taken for."""

    label: Array                   # [B, L] float32
    tokens: Sparse | None = None   # of each patch, [B, P, K]


class Taught(NamedTuple):
    """What a teacher says of a batch."""

    logits: Array  # [B, L] float32
    tokens: Array  # [B, P, D] float32, the patch tokens behind its last norm, in their places where it drops none


class Part(NamedTuple):
    """One term of the sum."""

    name: str
    weight: float
    loss: Callable[[Array, dict, Targets, Taught | None], Array]
    """(logits, what the model showed on the way, targets, what the teacher says if there is one) -> scalar."""


class Objective(NamedTuple):
    """What a training makes less."""

    parts: tuple[Part, ...]

    def __call__(self, logits: Array, seen: dict, targets: Targets,
                 taught: Taught | None = None) -> tuple[Array, dict[str, Array]]:
        """The loss; and its parts without their weights, `loss/...`, where there is more than one."""
        found = [part.loss(logits, seen, targets, taught) for part in self.parts]
        terms = [loss if part.weight == 1 else part.weight * loss for part, loss in zip(self.parts, found)]
        get_reducer = {f'loss/{part.name}': loss for part, loss in zip(self.parts, found)} if len(found) > 1 else {}
        return functools.reduce(operator.add, terms), get_reducer


def plain() -> Objective:
    """Cross entropy of the logits that are evaluated.

    Those of a model with a distillation token are the mean of both heads, so without a teacher both are trained by the
    labels. (A departure: the reference would leave the distillation head as it began, and yet evaluate the mean.)
    """
    return Objective((_labels(),))


def distilled(kind: str, *, alpha: float, tau: float) -> Objective:
    """The class head learns the labels, the head of the distillation token what the teacher says.

    Args:
      kind: 'hard', the class that the teacher names; or 'soft', all its logits.
      alpha: weight of the teacher; the labels have the rest.
      tau: temperature of 'soft'.

    Source: DeiT, section 4; its `losses.py`.
    """
    of_teacher = {'hard': losses.hard_distillation,
                  'soft': functools.partial(losses.soft_distillation, tau=tau)}[kind]
    return Objective((
        Part('labels', 1 - alpha, lambda logits, seen, targets, taught:
             losses.cross_entropy(seen['cls_logits'], targets.label)),
        Part('teacher', alpha, lambda logits, seen, targets, taught:
             of_teacher(seen['dist_logits'], taught.logits))))


def imitating(*, weight: float, token_weight: float, prefix: int) -> Objective:
    """The labels, and beside them the logits of a teacher, which as a rule is the same model with all its tokens.

    Args:
      weight: of the divergence from the teacher's logits; the labels have 1.
      token_weight: of the distance of the patch tokens that are left to the teacher's, which must drop none; 0: none.
      prefix: tokens in front of the patches.

    Source: DynamicViT, section 3.3.
    """
    parts = [_labels(), Part('teacher', weight, lambda logits, seen, targets, taught:
                             losses.divergence(logits, taught.logits))]
    if token_weight:
        parts.append(Part('tokens', token_weight, lambda logits, seen, targets, taught:
                          _token_distance(seen, prefix, taught.tokens)))
    return Objective(tuple(parts))


def keeping(shares: Sequence[float], weight: float) -> Part:
    """Draws the shares of tokens that predictors let stay to those wanted, one for each reduction."""
    return Part('kept', weight, lambda logits, seen, targets, taught: losses.kept_share(seen['decisions'], shares))


def token_labelled(weight: float) -> Objective:
    """The labels of the class token, and of every patch token that is left; one that was fused has none.

    Args:
      weight: of the patch tokens; the class token has 1. The published code has 1, the paper 0.5.

    Source: LV-ViT, equation 4; EViT, section 4 (implementation).
    """
    return Objective((
        Part('labels', 1.0, lambda logits, seen, targets, taught:
             losses.cross_entropy(seen['cls_logits'], targets.label)),
        Part('tokens', weight, lambda logits, seen, targets, taught:
             token_cross_entropy(seen['token_logits'], seen['token_patch'], targets.tokens, _left(seen)))))


def token_cross_entropy(logits: Array, patch: Array, targets: Sparse, left: Array | float = 1.0) -> Array:
    """Mean cross entropy of the tokens that are patches, of the whole batch.

    Args:
      logits: [B, N, L] float32.
      patch: [B, N] int32, whose they are; one with a negative id counts for nothing.
      targets: of each patch of the image, [B, P, K].
      left: [B, N] float32, 0 of what is masked.
    """
    value, index, floor = (_of_patches(field, patch) for field in targets)
    counts = (patch >= 0) * left
    loss = losses.sparse_cross_entropy(logits, value, index, floor)
    return (loss * counts).sum() / jnp.maximum(counts.sum(), 1)


def _labels():
    return Part('labels', 1.0, lambda logits, seen, targets, taught: losses.cross_entropy(logits, targets.label))


def _token_distance(seen, prefix, taught):
    """Of the student's patch tokens behind the last norm to the teacher's of the same patches."""
    tokens = seen['norm'][:, prefix:]
    patch = seen['kept'][-1] if seen['kept'] else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    return losses.token_distance(tokens, _of_patches(taught, patch), (patch >= 0) * _left(seen))


def _left(seen):
    """Where tokens are masked in place of being dropped, 1 of those that are left and 0 of the others; without it 1."""
    return jax.lax.stop_gradient(seen['decisions'][-1]) if seen.get('decisions') else 1.0


def _of_patches(values, patch):
    """Rows [B, N, ...] of [B, P, ...] by patch ids; of a fused token any."""
    place = jnp.maximum(patch, 0)
    return jnp.take_along_axis(values, place.reshape(*place.shape, *[1] * (values.ndim - 2)), axis=1)
