"""Similarity of the tokens and features of two models on the same images.

Source of the choice: Haurum et al., "Which Tokens to Use? Investigating Token Reduction in Vision Transformers", ICCVW
2023, arXiv 2308.04657. scikit-learn and scipy compute what they have.
"""

import importlib.util

import numpy as np

from evit_jax.comparison.recording import Record


def check_requirements(subject: str) -> None:
    """Raises a ValueError if scikit-learn is not installed. The message begins with the subject."""
    if importlib.util.find_spec('sklearn') is None:
        raise ValueError(f"{subject} needs the package scikit-learn: pip install 'evit_jax[analysis]'")


def kept_overlap(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the mean intersection over union of the kept patches. Images without kept patches in both are left out.

    Args:
      first, second: [N, P] int, index of the token that shows each patch; -1: hidden.
    """
    kept, other = first >= 0, second >= 0
    union = (kept | other).sum(1)
    return float(((kept & other).sum(1)[union > 0] / union[union > 0]).mean())


def group_agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Returns the agreement of merged groups: homogeneity, completeness and their harmonic mean, averaged over images.

    Homogeneity is 1 if each group of the first lies within one group of the second; completeness is that of the second
    in the first. The harmonic mean, the V measure, equals the NMI with arithmetic normalisation. Patches that either
    hides are left out.

    Args:
      first, second: see `kept_overlap`.
    """
    from sklearn.metrics import homogeneity_completeness_v_measure  # imported late: an optional dependency
    scores = []
    for groups, others in zip(first, second, strict=True):
        shown = (groups >= 0) & (others >= 0)
        if shown.any():
            scores.append(homogeneity_completeness_v_measure(others[shown], groups[shown]))
    return dict(zip(('homogeneity', 'completeness', 'nmi'), map(float, np.mean(scores, axis=0)), strict=True))


def linear_cka(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the linear centred kernel alignment of features [N, D] and [N, E], in [0, 1].

    Source: Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv 1905.00414.
    """
    x, y = (np.asarray(features, np.float64) - features.mean(0) for features in (first, second))
    return float(np.square(x.T @ y).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)))


def procrustes_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the squared distance of features [N, D] after translation, scaling and rotation, in [0, 1]."""
    from scipy.spatial import procrustes
    return float(procrustes(np.asarray(first, np.float64), np.asarray(second, np.float64))[2])


def removal_depths(record: Record) -> np.ndarray:
    """Returns the mean number of blocks that see each patch, [rows, columns]. A patch that stays sees all blocks."""
    depth = int(record.depth)
    seen = np.full(record.groups.shape[1:], depth)
    for block, groups in reversed(list(zip(record.blocks, record.groups))):
        seen = np.where(groups < 0, int(block), seen)
    return seen.mean(0).reshape(record.grid)


def centre_correlation(depths: np.ndarray) -> float:
    """Returns the rank correlation of the removal depths of patches with their nearness to the image centre.

    nan: all depths are equal.
    """
    from scipy.stats import spearmanr
    rows, columns = np.indices(depths.shape) - (np.asarray(depths.shape)[:, None, None] - 1) / 2
    if np.ptp(depths) == 0:
        return float('nan')
    return float(spearmanr(depths.ravel(), -np.hypot(rows, columns).ravel()).statistic)
