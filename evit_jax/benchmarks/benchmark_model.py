"""The model to benchmark or to search a plan for: a named model, a run, or weights of another program."""

import os
from typing import NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import ImageSize, ViTConfig, size_text
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.reduction.reducers import EVIT
from evit_jax.runtime import storage


class BenchmarkModel(NamedTuple):
    """A model with its default settings, which the flags of a program may override."""

    name: str
    config: ViTConfig
    image_size: ImageSize
    dtype: str
    budget: TokenBudget  # token budget of the run; a named model drops nothing
    run: str = ''        # path or Hub name of the weights; '' for a named model

    @property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that reduce tokens, in ascending order."""
        return tuple(sorted(self.budget.reduce_at))

    @property
    def fuse(self) -> bool:
        """True if the dropped tokens are fused into one token."""
        return self.budget.fuse and self.budget.reducer.can_fuse

    def plan(self) -> TokenPlan:
        """Returns the token plan of the run's training."""
        return self.budget.plans(self.config.patches(self.image_size), self.config.depth, self.config.macs)(1.0)


def find_model(flag: str, word: str) -> BenchmarkModel:
    """Returns the named model, or the model of a path or Hub name. A model name takes precedence over a folder.

    Args:
      flag: flag that holds the word, for messages.
      word: a model name, or a path or Hub name as in `open_model`.

    Raises:
      ValueError: the word is neither a model name nor the name of weights; see `open_model`.
    """
    folder = storage.as_path(word) if word else None
    if word in models.CONFIGS:
        if folder.is_dir():
            logging.warning('%s=%s is the named model; for the run in the folder %s give %s=%s', flag, word, word, flag,
                            os.path.join('.', word))
        config = models.get_config(word)
        budget = TokenBudget(EVIT, config.default_reduce_at, True, (1.0,) * len(config.default_reduce_at))
        return BenchmarkModel(word, config, config.image_size, 'float32', budget)
    if os.sep not in word and not (word and folder.exists()):
        models.get_config(word)  # raises the error that suggests the nearest name
    loaded = open_model(word)
    model = BenchmarkModel(loaded.name, loaded.config, loaded.image_size, loaded.dtype, loaded.budget, loaded.path)
    logging.info('%s: %s, images of %s, %s; its plan: %s', word, loaded.name, size_text(model.image_size),
                 model.dtype, model.plan())
    return model
