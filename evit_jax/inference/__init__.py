"""Trained models at work: `load('runs/digits').predict(['a.png'], rate=0.5)`."""

import os

from evit_jax.checkpoints.loaded import LoadedModel, load_model
from evit_jax.inference.predictor import Guess, Prediction, Predictor

__all__ = ['Guess', 'LoadedModel', 'Prediction', 'Predictor', 'load', 'load_model']


def load(path: str | os.PathLike, *, ema: bool = False, batch_size: int = 16) -> Predictor:
    """What was trained in a workdir, ready to predict.

    Args:
      path, ema: as of `load_model`.
      batch_size: images that are computed at a time.

    Raises:
      ValueError: as of `load_model`.
    """
    return Predictor(load_model(path, ema=ema).folded(), batch_size=batch_size)
