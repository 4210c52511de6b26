"""Teachers: frozen models of this project, that say what they think of the images that another one is trained on."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import logging
from jax import Array

from evit_jax import models
from evit_jax.checkpoints.loaded import load_model
from evit_jax.data.classes import readable_names
from evit_jax.models import Model, Params
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.training.objectives import Taught


class Teacher(NamedTuple):
    """A model that no gradient changes; its parameters go with it as an argument of the step."""

    model: Model
    plan: TokenPlan
    params: Params             # numpy arrays
    mean: tuple[float, ...]    # of the channels that it was trained on
    std: tuple[float, ...]
    patch_tokens: bool = False  # also return the patch tokens
    digest: str = ''           # digest of `arrays`

    @property
    def arrays(self) -> tuple:
        """All that decides its answers beside the model, as a tree of arrays, numbers and texts."""
        return self.params, self.mean, self.std, str(self.plan)

    def teach(self, params: Params, images: Array, mean: Sequence[float], std: Sequence[float]) -> Taught:
        """What it says, as in evaluation.

        Args:
          params: its own, on the devices.
          images: [B, S, S, 3] float32, normalised by `mean` and `std`.
        """
        if (tuple(mean), tuple(std)) != (self.mean, self.std):
            images = (images * jnp.asarray(std) + jnp.asarray(mean) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        logits, intermediates = self.model.apply(params, images, self.plan, patch_tokens=self.patch_tokens)
        return Taught(logits, intermediates.get('patch_tokens'))


def read(path: str | os.PathLike, *, ema: bool, dense: bool, image_size: int, class_names: Sequence[str],
         dtype: Any, patch_tokens: bool = False) -> Teacher:
    """Reads a teacher.

    Args:
      ema: the moving average of its weights.
      dense: every token stays in it; else it keeps to the plan that it was trained for.
      image_size: of the images that it is shown; its position embeddings are resized to it.
      class_names: that the student is to tell apart.
      dtype: of its computation.

    Raises:
      ValueError: no readable checkpoint, no average in it, other classes, or a size that its patches do not divide.
    """
    trained = load_model(path, ema=ema)
    names = readable_names(class_names)
    if len(trained.class_names) != len(names):
        raise ValueError(f'the teacher in {path} tells {len(trained.class_names)} classes apart, this data has '
                         f'{len(names)}: give a teacher that was trained on the same classes')
    if _are_names(names) and _are_names(trained.class_names) and names != trained.class_names:
        there, here = next(pair for pair in zip(trained.class_names, names) if pair[0] != pair[1])
        raise ValueError(f'the teacher in {path} knows other classes (the first that differs is {there!r} there, '
                         f'{here!r} in the data): give a teacher that was trained on the same classes')
    trained = trained._replace(image_size=image_size)
    model = models.create(trained.config, dtype=dtype, modules=trained.modules)
    plan = (make_plan(trained.config.patches(image_size), trained.config.depth, reduce_at=()) if dense else
            trained.plan())
    logging.info('the teacher is %s of %s at step %d: %s', trained.name, path, trained.step, plan)
    return Teacher(model, plan, trained.params, trained.mean, trained.std, patch_tokens)


def _are_names(names):
    """Whether these are more than numbers."""
    return any(name != str(label) for label, name in enumerate(names))
