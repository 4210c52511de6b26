"""Trained models at work: `load('runs/digits').predict(['a.png'], rate=0.5)`."""

import os

from evit_jax.inference.predictor import Guess, Prediction, Predictor
from evit_jax.training.trained import Trained, read_trained

__all__ = ['Guess', 'Prediction', 'Predictor', 'Trained', 'load', 'read_trained']


def load(path: str | os.PathLike, *, ema: bool = False, batch_size: int = 16) -> Predictor:
    """What was trained in a workdir, ready to predict.

    Args:
      path, ema: as of `read_trained`.
      batch_size: images that are computed at a time.

    Raises:
      ValueError: as of `read_trained`.
    """
    return Predictor(read_trained(path, ema=ema).folded(), batch_size=batch_size)
