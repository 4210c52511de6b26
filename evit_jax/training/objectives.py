"""Training objectives. An objective is a weighted sum of named loss terms."""

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
    tokens: Sparse | None = None  # token labels of each patch, [B, P, K]


class Taught(NamedTuple):
    """The outputs of a teacher for a batch."""

    logits: Array         # [B, L] float32
    tokens: Array | None  # [B, P, D] float32, patch tokens after the last norm, in patch order; None if not used


class Term(NamedTuple):
    """One term of an objective."""

    name: str
    weight: float
    loss: Callable[[Array, dict, Targets, Taught | None], Array]
    """(logits, intermediates of the model, targets, teacher outputs) -> scalar."""
    reads_patch_tokens: bool = False  # the loss reads intermediates['patch_tokens']


class Objective(NamedTuple):
    """A weighted sum of loss terms."""

    terms: tuple[Term, ...]

    @property
    def reads_patch_tokens(self) -> bool:
        """True if a term reads the patch tokens of the model."""
        return any(term.reads_patch_tokens for term in self.terms)

    def __call__(self, logits: Array, intermediates: dict, targets: Targets,
                 taught: Taught | None = None) -> tuple[Array, dict[str, Array]]:
        """Returns the loss and a dict of its unweighted terms, `loss/NAME`, if there are several."""
        values = [term.loss(logits, intermediates, targets, taught) for term in self.terms]
        weighted = [loss if term.weight == 1 else term.weight * loss for term, loss in zip(self.terms, values)]
        named = {f'loss/{term.name}': loss for term, loss in zip(self.terms, values)} if len(values) > 1 else {}
        return functools.reduce(operator.add, weighted), named


def classification_loss() -> Objective:
    """Returns the cross entropy of the logits that evaluation uses.

    The logits of a distilled model are the mean of both heads. Without a teacher, the labels thus train both heads.
    (A departure: the reference leaves the distillation head untrained, but also evaluates the mean.)
    """
    return Objective((_labels(),))


def distillation_loss(kind: str, *, alpha: float, tau: float) -> Objective:
    """Returns DeiT's loss: the class head learns the labels, the distillation head learns the teacher's outputs.

    Args:
      kind: target of the distillation head: 'hard': class with the largest teacher logit; 'soft': all teacher logits.
      alpha: weight of the teacher's term; the term of the labels has weight 1 - alpha.
      tau: temperature for 'soft'.

    Source: DeiT, section 4; its `losses.py`.
    """
    loss = {'hard': losses.hard_distillation, 'soft': functools.partial(losses.soft_distillation, tau=tau)}[kind]
    return Objective((
        Term('labels', 1 - alpha, lambda logits, intermediates, targets, taught:
             losses.cross_entropy(intermediates['cls_logits'], targets.label)),
        Term('teacher', alpha, lambda logits, intermediates, targets, taught:
             loss(intermediates['dist_logits'], taught.logits))))


def self_distillation_loss(*, weight: float, token_weight: float) -> Objective:
    """Returns DynamicViT's distillation loss. The teacher is usually the dense version of the same model.

    Args:
      weight: weight of the divergence from the teacher's logits; the term of the labels has weight 1.
      token_weight: weight of the distance between the kept patch tokens and those of the teacher; 0: no such term. The
        teacher must keep all tokens.

    Source: DynamicViT, section 3.3.
    """
    terms = [_labels(), Term('teacher', weight, lambda logits, intermediates, targets, taught:
                             losses.divergence(logits, taught.logits))]
    if token_weight:
        terms.append(Term('tokens', token_weight, lambda logits, intermediates, targets, taught:
                          _token_distance(intermediates, taught.tokens), reads_patch_tokens=True))
    return Objective(tuple(terms))


def keep_ratio_loss(fractions: Sequence[float], weight: float) -> Term:
    """Returns the term that draws the fraction of unmasked tokens in each reduction towards the requested one."""
    return Term('kept', weight, lambda logits, intermediates, targets, taught:
                losses.keep_ratio(intermediates['mask'], fractions))


def token_label_loss(weight: float) -> Objective:
    """Returns LV-ViT's loss: the class token learns the label, each kept patch token learns its token label.

    Fused tokens have no token labels.

    Args:
      weight: weight of the patch tokens; the class token has weight 1. The published code uses 1, the paper 0.5.

    Source: LV-ViT, equation 4; EViT, section 4 (implementation).
    """
    return Objective((
        Term('labels', 1.0, lambda logits, intermediates, targets, taught:
             losses.cross_entropy(intermediates['cls_logits'], targets.label)),
        Term('tokens', weight, lambda logits, intermediates, targets, taught:
             token_cross_entropy(intermediates['token_logits'], intermediates['token_patch'], targets.tokens,
                                 _unmasked(intermediates)))))


def token_cross_entropy(logits: Array, patch_ids: Array, targets: Sparse, unmasked: Array | float = 1.0) -> Array:
    """Computes the cross entropy of the patch tokens, averaged over the whole batch.

    Args:
      logits: [B, N, L] float32.
      patch_ids: [B, N] int32; tokens with a negative id are excluded.
      targets: token labels of each patch of the image, [B, P, K].
      unmasked: [B, N] float32: 1 kept, 0 masked.
    """
    value, index, floor = (_of_patches(field, patch_ids) for field in targets)
    counts = (patch_ids >= 0) * unmasked
    loss = losses.sparse_cross_entropy(logits, value, index, floor)
    return (loss * counts).sum() / jnp.maximum(counts.sum(), 1)


def _labels():
    return Term('labels', 1.0, lambda logits, intermediates, targets, taught:
                losses.cross_entropy(logits, targets.label))


def _token_distance(intermediates, teacher):
    """Computes the distance between patch tokens of the student and the teacher's tokens for the same patches."""
    tokens, kept = intermediates['patch_tokens'], intermediates['kept']
    patch_ids = kept[-1] if kept else jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
    counts = (patch_ids >= 0) * _unmasked(intermediates)
    return losses.token_distance(tokens, _of_patches(teacher, patch_ids), counts)


def _unmasked(intermediates):
    """Returns 1 for each token that is unmasked after the last reduction, else 0; or just 1 if no tokens are masked."""
    return jax.lax.stop_gradient(intermediates['mask'][-1]) if intermediates.get('mask') else 1.0


def _of_patches(values, patch_ids):
    """Gathers rows [B, N, ...] of [B, P, ...] by patch id. The row of a fused token is arbitrary."""
    index = jnp.maximum(patch_ids, 0)
    return jnp.take_along_axis(values, index.reshape(*index.shape, *[1] * (values.ndim - 2)), axis=1)
