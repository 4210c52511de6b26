"""Data of a page that shows single images: the tokens after each reduction, under several settings."""

from typing import NamedTuple

import numpy as np


class ReductionView(NamedTuple):
    """The tokens after one reduction."""

    kept: tuple[int, ...]         # patch id of each token, best first; negative for a fused token
    attention: np.ndarray | None  # [N] float32, class attention to each patch; NaN if an earlier reduction dropped the
                                  # patch. None if unknown
    fused_weights: np.ndarray | None  # [N] float32, weight of each patch in the token fused here; None if none is fused
    token_of_patch: np.ndarray | None = None  # [N] int, index of the token that holds each patch; -1 if no token holds
                                              # it. None if every token holds only the patch of its id


class View(NamedTuple):
    """The guesses and the reductions of an image under one setting."""

    guesses: tuple[tuple[str, float], ...]  # class name and probability, best first
    stages: tuple[ReductionView, ...]
    right: bool | None                      # None if the true class is unknown


class Example(NamedTuple):
    """An image, with a view for each setting."""

    name: str
    image: np.ndarray  # [S, S, 3] uint8
    truth: str | None
    views: tuple[View, ...]


class Setting(NamedTuple):
    """One position of the page's slider."""

    rate: str
    counts: tuple[int, ...]  # number of tokens that enter the first reduction, then that leave each reduction
    macs: int                # MACs of an image
    share: float             # MACs relative to the dense model
    trained: bool            # True if the model was trained under this setting
