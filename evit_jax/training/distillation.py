"""Teachers: frozen models whose outputs train another model, the student."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from absl import logging
from jax import Array

from evit_jax import models
from evit_jax.data.classes import readable_names
from evit_jax.interchange.opening import check_exists, open_model
from evit_jax.models import Model, Params
from evit_jax.models.config import ImageSize
from evit_jax.reduction.plan import TokenPlan, make_plan
from evit_jax.training.objectives import Taught

KINDS = ('none', 'hard', 'soft', 'self')  # values of config.distill.kind


class Teacher(NamedTuple):
    """A model with frozen weights. Its parameters are passed to the training step as an argument."""

    model: Model
    plan: TokenPlan
    params: Params             # numpy arrays
    mean: tuple[float, ...]    # mean of each channel of its inputs
    std: tuple[float, ...]     # standard deviation of each channel of its inputs
    patch_tokens: bool = False  # True: also return the patch tokens
    digest: str = ''           # digest of `arrays`

    @property
    def arrays(self) -> tuple:
        """The values besides the model that determine its outputs: a tree of arrays, numbers and strings."""
        return self.params, self.mean, self.std, str(self.plan)

    def teach(self, params: Params, images: Array, mean: Sequence[float], std: Sequence[float]) -> Taught:
        """Runs the teacher in evaluation mode.

        Args:
          params: parameters of the teacher, on the devices.
          images: [B, S, S, 3] float32, normalised with `mean` and `std`.
        """
        if (tuple(mean), tuple(std)) != (self.mean, self.std):
            images = (images * jnp.asarray(std) + jnp.asarray(mean) - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        logits, intermediates = self.model.apply(params, images, self.plan, patch_tokens=self.patch_tokens)
        return Taught(logits, intermediates.get('patch_tokens'))


def load_teacher(path: str | os.PathLike, *, ema: bool, dense: bool, image_size: ImageSize,
                 class_names: Sequence[str], dtype: Any, patch_tokens: bool = False) -> Teacher:
    """Loads a teacher.

    Args:
      path: path or name of a model; see `open_model`.
      ema: load the EMA of the teacher's weights.
      dense: True: keep all tokens; False: use the plan with which the teacher was trained.
      image_size: size of the images. The position embeddings of the teacher are resized to this size.
      class_names: classes of the student.
      dtype: compute dtype of the teacher.
      patch_tokens: also return the patch tokens of the teacher.

    Raises:
      ValueError: the teacher has no readable checkpoint, no EMA or other classes, or the image size is not divisible by
        its patch size.
    """
    trained = open_model(path, ema=ema)
    names = readable_names(class_names)
    if len(trained.class_names) != len(names):
        raise ValueError(f'the teacher in {path} has {len(trained.class_names)} classes, this data has {len(names)}: '
                         'give a teacher that was trained on the same classes')
    if _has_names(names) and _has_names(trained.class_names) and names != trained.class_names:
        there, here = next(pair for pair in zip(trained.class_names, names) if pair[0] != pair[1])
        raise ValueError(f'the teacher in {path} has other classes (the first that differs is {there!r} there, '
                         f'{here!r} in the data): give a teacher that was trained on the same classes')
    trained = trained._replace(image_size=image_size)
    model = models.create(trained.config, dtype=dtype, modules=trained.modules)
    plan = (make_plan(trained.config.patches(image_size), trained.config.depth, reduce_at=()) if dense else
            trained.plan())
    logging.info('teacher: %s in %s at step %d: %s', trained.name, path, trained.step, plan)
    return Teacher(model, plan, trained.params, trained.mean, trained.std, patch_tokens)


def read_teacher(config: Mapping[str, Any], plan: TokenPlan, width: int, class_names: Sequence[str],
                 dtype: Any) -> Teacher | None:
    """Loads the teacher of a config. Returns None if the config has no teacher.

    Args:
      config: flat config of the student's run.
      plan: token plan of the student.
      width: width of the student.
      class_names: classes of the student.
      dtype: compute dtype of the teacher.

    Raises:
      ValueError: the teacher cannot be read, or does not match the student.
    """
    if config['distill.kind'] == 'none':
        return None
    _, path, ema = _source(config)
    teacher = load_teacher(path, ema=ema, dense=config['teacher.dense'], image_size=models.image_size_of(config),
                           class_names=class_names, dtype=dtype, patch_tokens=compares_tokens(config))
    if compares_tokens(config):
        there, here = (teacher.plan.patches, teacher.model.config.width), (plan.patches, width)
        if there != here:
            raise ValueError(f'the teacher in {path} has {there[0]} tokens of width {there[1]}, this model {here[0]} '
                             f'of width {here[1]}: their tokens cannot be compared, give '
                             '--config.distill.token_weight=0')
    return teacher


def compares_tokens(config: Mapping[str, Any]) -> bool:
    """Returns True if the loss compares the patch tokens of student and teacher."""
    return config['distill.kind'] == 'self' and config['distill.token_weight'] > 0


def check_teacher(config: Mapping[str, Any]) -> None:
    """Raises a ValueError if the flat config needs a teacher that has no checkpoint."""
    if config['distill.kind'] == 'none':
        return
    key, path, _ = _source(config)
    if not path:
        raise ValueError(f'this recipe learns from a teacher: give --config.{key} of a trained model, or '
                         '--config.distill.kind=none to learn from the labels alone')
    check_exists(path, key)


def _source(config):
    """Returns the config key of the teacher's path, the path, and whether to load the EMA.

    Self-distillation uses the initial weights as the teacher if `teacher.path` is empty.
    """
    path_key, ema_key = 'teacher.path', 'teacher.ema'
    if config['distill.kind'] == 'self' and not config[path_key]:
        path_key, ema_key = 'init_from', 'init_ema'
    return path_key, config[path_key], config[ema_key]


def _has_names(names):
    """Returns True if the class names are not just numbers."""
    return any(name != str(label) for label, name in enumerate(names))
