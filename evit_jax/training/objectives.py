"""Training objectives. An objective is a value: a weighted sum of named loss terms."""

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
    """The targets of a batch."""

    label: Array                  # [B, L] float32
    tokens: Sparse | None = None  # for each patch, [B, P, K]


class Taught(NamedTuple):
    """The outputs of a teacher for a batch."""

    logits: Array         # [B, L] float32
    tokens: Array | None  # [B, P, D] float32, patch tokens after the last norm in the order of the patches, if compared


class Term(NamedTuple):
    """One term of an objective."""

    name: str
    weight: float
    loss: Callable[[Array, dict, Targets, Taught | None], Array]
    """(logits, intermediates of the model, targets, outputs of the teacher) -> scalar."""


class Objective(NamedTuple):
    """A weighted sum of loss terms."""

    terms: tuple[Term, ...]

    def __call__(self, logits: Array, intermediates: dict, targets: Targets,
                 taught: Taught | None = None) -> tuple[Array, dict[str, Array]]:
        """Returns the loss, and its unweighted terms as `loss/NAME` if there is more than one."""
        values = [term.loss(logits, intermediates, targets, taught) for term in self.terms]
        weighted = [loss if term.weight == 1 else term.weight * loss for term, loss in zip(self.terms, values)]
        named = {f'loss/{term.name}': loss for term, loss in zip(self.terms, values)} if len(values) > 1 else {}
        return functools.reduce(operator.add, weighted), named


def classification_loss() -> Objective:
    """Cross entropy of the logits that are evaluated.

    The logits of a distilled model are the mean of both heads, so without a teacher the labels train both. (A
    departure: the reference leaves the distillation head untrained, and evaluates the mean all the same.)
    """
    return Objective((_labels(),))


def distillation_loss(kind: str, *, alpha: float, tau: float) -> Objective:
    """DeiT's distillation: the class head learns the labels, the distillation head the outputs of the teacher.

    Args:
      kind: 'hard': the class with the largest teacher logit; 'soft': all teacher logits.
      alpha: weight of the teacher's term; the labels have 1 - alpha.
      tau: temperature of 'soft'.

    Source: DeiT, section 4; its `losses.py`.
    """
    loss = {'hard': losses.hard_distillation, 'soft': functools.partial(losses.soft_distillation, tau=tau)}[kind]
    return Objective((
        Term('labels', 1 - alpha, lambda logits, intermediates, targets, taught:
             losses.cross_entropy(intermediates['cls_logits'], targets.label)),
        Term('teacher', alpha, lambda logits, intermediates, targets, taught:
             loss(intermediates['dist_logits'], taught.logits))))


def self_distillation_loss(*, weight: float, token_weight: float) -> Objective:
    """DynamicViT's distillation from a teacher that usually is the same model with all its tokens.

    Args:
      weight: weight of the divergence from the teacher's logits; the labels have 1.
      token_weight: weight of the distance between the remaining patch tokens and those of the teacher, which must
        reduce nothing; 0: no such term.

    Source: DynamicViT, section 3.3.
    """
    terms = [_labels(), Term('teacher', weight, lambda logits, intermediates, targets, taught:
                             losses.divergence(logits, taught.logits))]
    if token_weight:
        terms.append(Term('tokens', token_weight, lambda logits, intermediates, targets, taught:
                          _token_distance(intermediates, taught.tokens)))
    return Objective(tuple(terms))


def keep_ratio_loss(fractions: Sequence[float], weight: float) -> Term:
    """Term that draws the fraction of unmasked tokens to the requested one, for each reduction."""
    return Term('kept', weight, lambda logits, intermediates, targets, taught:
                losses.keep_ratio(intermediates['mask'], fractions))


def token_label_loss(weight: float) -> Objective:
    """LV-ViT's loss: the class token learns the label, each remaining patch token its token label.

    A fused token has no token label.

    Args:
      weight: weight of the patch tokens; the class token has 1. The published code has 1, the paper 0.5.

    Source: LV-ViT, equation 4; EViT, section 4 (implementation).
    """
    return Objective((
        Term('labels', 1.0, lambda logits, intermediates, targets, taught:
             losses.cross_entropy(intermediates['cls_logits'], targets.label)),
        Term('tokens', weight, lambda logits, intermediates, targets, taught:
             token_cross_entropy(intermediates['token_logits'], intermediates['token_patch'], targets.tokens,
                                 _unmasked(intermediates)))))


def token_cross_entropy(logits: Array, patch_ids: Array, targets: Sparse, unmasked: Array | float = 1.0) -> Array:
    """Computes the mean cross entropy of the patch tokens, over the whole batch.

    Args:
      logits: [B, N, L] float32.
      patch_ids: [B, N] int32; a token with a negative id does not count.
      targets: for each patch of the image, [B, P, K].
      unmasked: [B, N] float32, 0 for masked tokens.
    """
    value, index, floor = (_of_patches(field, patch_ids) for field in targets)
    counts = (patch_ids >= 0) * unmasked
    loss = losses.sparse_cross_entropy(logits, value, index, floor)
    return (loss * counts).sum() / jnp.maximum(counts.sum(), 1)


def _labels():
    return Term('labels', 1.0, lambda logits, intermediates, targets, taught:
                losses.cross_entropy(logits, targets.label))


def _token_distance(intermediates, teacher):
    """Distance between the student's patch tokens after the last norm and the teacher's tokens of the same patches."""
    tokens, kept = intermediates['patch_tokens'], intermediates['kept']
    patch_ids = kept[-1] if kept else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    counts = (patch_ids >= 0) * _unmasked(intermediates)
    return losses.token_distance(tokens, _of_patches(teacher, patch_ids), counts)


def _unmasked(intermediates):
    """1 for each token that is unmasked after the last reduction, else 0; 1 if tokens are not masked."""
    return jax.lax.stop_gradient(intermediates['mask'][-1]) if intermediates.get('mask') else 1.0


def _of_patches(values, patch_ids):
    """Rows [B, N, ...] of [B, P, ...] by patch ids; any row for a fused token."""
    index = jnp.maximum(patch_ids, 0)
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)
