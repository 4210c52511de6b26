"""What is drawn of an image: what each stage keeps of it, looks at and fuses, under several settings."""

from typing import NamedTuple

import numpy as np


class Stage(NamedTuple):
    """A reduction of tokens."""

    kept: tuple[int, ...]         # patch ids that leave it, best first; negative: a fused token
    attention: np.ndarray | None  # [N] float32, of the class token to each patch; NaN: gone before. None: not known
    origin: np.ndarray | None     # [N] float32, how much of each patch is in the token fused here. None: none is
    token_of_patch: np.ndarray | None = None  # [N] int: index of the token that holds each patch. None: nothing is
                                              # merged


class View(NamedTuple):
    """An image under one setting."""

    guesses: tuple[tuple[str, float], ...]  # class and probability, best first
    stages: tuple[Stage, ...]
    right: bool | None                      # None where the truth is not known


class Example(NamedTuple):
    """An image under all settings."""

    name: str
    image: np.ndarray  # [S, S, 3] uint8
    truth: str | None
    views: tuple[View, ...]


class Setting(NamedTuple):
    """What one position of the slider means."""

    rate: str
    counts: tuple[int, ...]  # tokens that enter, and that leave each stage
    macs: int                # of an image
    share: float             # of the dense model's
    trained: bool            # as the model was trained
