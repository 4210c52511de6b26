"""The prediction of one image, computed from the outputs of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evit_jax.reduction.plan import TokenPlan

# Outputs of the model that a prediction needs, in addition to the logits.
OUTPUTS = ('kept', 'token_of_patch', 'patch_ids', 'class_attention', 'fused_weights')

NOT_FINITE = 'its outputs are not finite: the computation overflows, which float32 (model.dtype) may prevent'


class Guess(NamedTuple):
    """A class and its probability."""

    label: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """The result for one image of N patches. If there is a `problem`, only `name` and sometimes `image` are set."""

    name: str                             # path of the file; 'image 3' for an image without a path
    problem: str = ''                     # reason why there is no prediction
    top: tuple[Guess, ...] = ()           # likeliest classes, best first
    logits: np.ndarray | None = None      # [L] float32
    image: np.ndarray | None = None       # [S, S, 3] uint8, the input of the model
    kept: tuple[np.ndarray, ...] = ()     # per reduction, [K] patch ids, best first; negative: a fused token
    token_of_patch: tuple[np.ndarray, ...] = ()  # per reduction, [N] int32: index of the token that holds each patch;
                                                 # only with a reducer that merges
    attention: tuple[np.ndarray, ...] = ()  # per reduction, [N] float32: class attention to the token of each patch;
                                            # NaN: an earlier reduction dropped the patch. Empty if the reducer works
                                            # before the attention
    fused_weights: tuple[np.ndarray, ...] = ()  # per reduction that fuses, [N] float32: weight of each patch in the
                                                # fused token


def predictions(outputs: Mapping[str, Any], images: Sequence[np.ndarray], plan: TokenPlan,
                class_names: Sequence[str], top: int) -> Iterator[Prediction]:
    """Yields the predictions of a batch, without names. Rows without an image are padding and are skipped.

    Args:
      outputs: numpy arrays with one row per image: 'logits', and the outputs in `OUTPUTS`.
      images: one array uint8 [S, S, 3] per image.
      top: number of guesses.
    """
    for row, image in enumerate(images):
        logits = outputs['logits'][row]
        if not np.isfinite(logits).all():
            yield Prediction('', problem=NOT_FINITE, image=image)
            continue
        kept, token_of_patch, entering, attention, fused_weights = (
            tuple(array[row] for array in outputs[name]) for name in OUTPUTS)
        if plan.reducer.merges:
            token_entering = (np.arange(plan.patches), *token_of_patch)
            attention = tuple(np.where(index < 0, np.float32(np.nan), values[index])
                              for values, index in zip(attention, token_entering))
        else:
            attention = tuple(_by_patch(*pair, plan.patches) for pair in zip(entering, attention))
            token_of_patch = ()
        yield Prediction('', top=best_guesses(logits, class_names, top), logits=logits, image=image, kept=kept,
                         token_of_patch=token_of_patch, attention=attention, fused_weights=fused_weights)


def best_guesses(logits: np.ndarray, class_names: Sequence[str], top: int) -> tuple[Guess, ...]:
    """Returns the likeliest classes, best first.

    Args:
      logits: [L] float32, finite.
      top: maximum number of classes.
    """
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    return tuple(Guess(label, class_names[label], float(probabilities[label]))
                 for label in np.argsort(-logits, kind='stable')[:top].tolist())


def _by_patch(patch_ids, attention, num_patches):
    """Returns the class attention [N] in the order of the patches. Absent patches are NaN; fused tokens are skipped."""
    by_patch = np.full(num_patches, np.nan, np.float32)
    by_patch[patch_ids[patch_ids >= 0]] = attention[patch_ids >= 0]
    return by_patch
