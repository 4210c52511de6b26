"""Models to measure: named ones, and the models of runs with their plans."""

import os
from typing import NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.checkpoints.loaded import load_model
from evit_jax.models.config import ViTConfig
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducers import EVIT
from evit_jax.runtime import storage


class MeasuredModel(NamedTuple):
    """A model, and the plan settings that apply where no flag names others."""

    name: str
    config: ViTConfig
    image_size: int
    dtype: str
    budget: TokenBudget  # a named model drops nothing
    run: str = ''     # folder of the run, or of weights alone; '': a named model

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that drop tokens, in ascending order."""
        return tuple(sorted(self.budget.reduce_at))

    @property
    def fuse(self) -> bool:
        return self.budget.fuse and self.budget.reducer.can_fuse

    def plan(self) -> TokenPlan:
        """The plan of the run."""
        return self.budget.plans(self.config.patches(self.image_size), self.config.depth, self.config.macs)(1.0)


def find_model(flag: str, word: str) -> MeasuredModel:
    """The model of a name, or of the run in a folder; a word that is both is the name.

    Args:
      flag: that the word was given to, for messages.

    Raises:
      ValueError: neither a model nor a run.
    """
    folder = storage.as_path(word) if word else None
    if word in models.CONFIGS:
        if folder.is_dir():
            logging.warning('%s=%s is the named model; for the run in the folder %s give %s=%s', flag, word, word, flag,
                            os.path.join('.', word))
        config = models.get_config(word)
        budget = TokenBudget(EVIT, config.default_reduce_at, True, (1.0,) * len(config.default_reduce_at))
        return MeasuredModel(word, config, config.image_size, 'float32', budget)
    if os.sep not in word and not (word and folder.exists()):
        models.get_config(word)  # raises the error that names the nearest
    trained = load_model(word)
    found = MeasuredModel(trained.name, trained.config, trained.image_size, trained.dtype, trained.budget, word)
    logging.info('%s: %s, images of %d, %s; its plan: %s', word, trained.name, found.image_size, found.dtype,
                 found.plan())
    return found
