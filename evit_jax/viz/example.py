"""The data of a page about single images: the tokens of each stage, under several settings."""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
    """The tokens after one reduction."""

    kept: tuple[int, ...]         # patch id of each token, best first; negative for a fused token
    attention: np.ndarray | None  # [N] float32, class attention to each patch; NaN if the patch was dropped before.
                                  # None if unknown
    fused_weights: np.ndarray | None  # [N] float32, weight of each patch in the token fused here; None without fusion
    token_of_patch: np.ndarray | None = None  # [N] int, index of the token that holds each patch, -1 for none. None if
                                              # every token holds only the patch of its id


class View(NamedTuple):
    """An image under one setting."""

    guesses: tuple[tuple[str, float], ...]  # class name and probability, best first
    stages: tuple[Stage, ...]
    right: bool | None                      # None without a truth


class Example(NamedTuple):
    """An image under all settings."""

    name: str
    image: np.ndarray  # [S, S, 3] uint8
    truth: str | None
    views: tuple[View, ...]


class Setting(NamedTuple):
    """One position of the slider of the page."""

    rate: str
    counts: tuple[int, ...]  # tokens that enter the first stage, and that leave each stage
    macs: int                # MACs of an image
    share: float             # MACs relative to the dense model
    trained: bool            # True for the setting of the training
