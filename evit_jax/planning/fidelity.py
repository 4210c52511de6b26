"""Measures how much a token plan changes the outputs of a model."""

from typing import NamedTuple

import numpy as np

from evit_jax.models.config import ViTConfig
from evit_jax.planning.blockwise import Outputs


class Fidelity(NamedTuple):
    """Compares outputs with those of the dense model on the same B images."""

    dense: Outputs
    has_classes: bool            # the logits are those of classes
    labels: np.ndarray | None = None  # [B] int32; None: unlabelled

    @classmethod
    def of(cls, config: ViTConfig, dense: Outputs, labels: np.ndarray | None = None) -> 'Fidelity':
        """Returns the comparison for a model."""
        return cls(dense, config.has_classes, labels if config.has_classes else None)

    @property
    def name(self) -> str:
        """The name of the error: the Kullback-Leibler divergence of the class probabilities, or 100 (1 - cosine)."""
        return 'KL divergence' if self.has_classes else '100 (1 - cosine)'

    def errors(self, outputs: Outputs) -> np.ndarray:
        """Returns the error of each image, [B] float64: `name` between the outputs and those of the dense model.

        The cosine is that of the features, or of the embedding if the model has a projection.
        """
        if self.has_classes:
            log_p, log_q = _log_softmax(self.dense.logits), _log_softmax(outputs.logits)
            return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0)
        a, b = self.dense.logits.astype(np.float64), outputs.logits.astype(np.float64)
        cosine = (a * b).sum(-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-30)
        return np.maximum(100 * (1 - cosine), 0)

    def figures(self, outputs: Outputs) -> dict[str, float]:
        """Returns the mean and the 90 % quantile of the error; agreement of the best class and accuracy if known."""
        errors = self.errors(outputs)
        figures = {'error': float(errors.mean()), 'error_90': float(np.quantile(errors, 0.9))}
        if self.has_classes:
            best = outputs.logits.argmax(-1)
            figures['agreement'] = float((best == self.dense.logits.argmax(-1)).mean())
            if self.labels is not None:
                figures['top1'] = float((best == self.labels).mean())
        return figures


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
