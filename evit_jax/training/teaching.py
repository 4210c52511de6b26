"""What a run learns from, made from its config: the objective, and the teacher if there is one."""

from collections.abc import Sequence
from typing import Any

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.manager import newest_step
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.plan import TokenPlan
from evit_jax.training import distillation, objectives
from evit_jax.training.distillation import Teacher
from evit_jax.training.objectives import Objective

KINDS = ('none', 'hard', 'soft', 'self')  # of distillation


def check(config: Any) -> None:
    """Raises a ValueError for values that do not go together; reads nothing."""
    distill, kind = config.distill, config.distill.kind
    if kind in ('hard', 'soft') and not config.model.distilled:
        raise ValueError(f'config.distill.kind={kind} teaches a distillation token, which this model lacks: give '
                         '--config.model.distilled=True, or --config.distill.kind=self to teach the class token')
    if kind in ('hard', 'soft') and config.model.one_head:
        raise ValueError(f'config.distill.kind={kind} teaches the head of the distillation token, which this model '
                         'lacks: give --config.model.one_head=False, or --config.distill.kind=self')
    if kind == 'none' and config.teacher.path:
        raise ValueError(f'nothing is learned from the teacher in {config.teacher.path}: give --config.distill.kind='
                         f'{", ".join(KINDS[1:-1])} or {KINDS[-1]}, or no config.teacher.path')
    if kind == 'self' and distill.token_weight and not config.teacher.dense:
        raise ValueError(f'config.distill.token_weight={distill.token_weight} compares tokens with those of a teacher '
                         'that drops none: give --config.teacher.dense=True, or --config.distill.token_weight=0')
    _check_token_labels(config)

    scaled = config.optimizer.backbone_scale != 1 or config.optimizer.backbone_from_epoch
    if scaled and not registry.get_reducer(config.reducer.name).is_learned:
        raise ValueError(f'config.optimizer.backbone_scale and backbone_from_epoch are for all parameters but '
                         f'those of the reducer, and reducer {config.reducer.name} has none: leave them at 1 and 0')


def _check_token_labels(config):
    if not config.data.token_labels:
        return
    if not isinstance(models.get_config(config.model.name), LVViTConfig):
        raise ValueError(f'config.data.token_labels={config.data.token_labels} is for models with a head for tokens, '
                         f'which {config.model.name} lacks: take an lvvit, or give --config.data.token_labels=')
    if config.distill.kind != 'none':
        raise ValueError(f'config.distill.kind={config.distill.kind} and config.data.token_labels both say what is '
                         'learned: give one of them')
    if config.mixing.mixup or config.mixing.cutmix:
        raise ValueError('with config.data.token_labels, patches are swapped in place of mixing images: give '
                         '--config.mixing.mixup=0 --config.mixing.cutmix=0')


def check_teacher(config: Any) -> None:
    """Raises a ValueError where the config needs a teacher and there is none."""
    if config.distill.kind == 'none':
        return
    key, path, _ = _place(config)
    if not path:
        raise ValueError(f'this recipe learns from a teacher: give --config.{key}=WORKDIR of a trained run, or '
                         '--config.distill.kind=none to learn from the labels alone')
    weights.check_is_workdir(f'config.{key}', path)
    if newest_step(path) is None:
        raise ValueError(f'config.{key}={path} holds no checkpoint: give the workdir of a trained run')


def read_teacher(config: Any, plan: TokenPlan, width: int, class_names: Sequence[str],
                 dtype: Any) -> Teacher | None:
    """The teacher, or None where the config has none.

    Args:
      plan, width: of the student.
      class_names: that it is to tell apart.
      dtype: of the teacher's computation.

    Raises:
      ValueError: it cannot be read, or is none for this student.
    """
    if config.distill.kind == 'none':
        return None
    _, path, ema = _place(config)
    teacher = distillation.read(path, ema=ema, dense=config.teacher.dense, image_size=config.model.image_size,
                            class_names=class_names, dtype=dtype, patch_tokens=compares_tokens(config))
    if config.distill.kind == 'self' and config.distill.token_weight:
        there, here = (teacher.plan.patches, teacher.model.config.width), (plan.patches, width)
        if there != here:
            raise ValueError(f'the teacher in {path} has {there[0]} tokens of width {there[1]}, this model {here[0]} '
                             f'of width {here[1]}: they can be compared with --config.distill.token_weight=0 alone')
    return teacher


def compares_tokens(config: Any) -> bool:
    """Returns True if the loss compares patch tokens with those of a teacher."""
    return config.distill.kind == 'self' and config.distill.token_weight > 0


def objective(config: Any, plan: TokenPlan) -> Objective:
    """Returns the training objective under a plan."""
    distill = config.distill
    if distill.kind in ('hard', 'soft'):
        found = objectives.distillation_loss(distill.kind, alpha=distill.alpha, tau=distill.tau)
    elif distill.kind == 'self':
        found = objectives.self_distillation_loss(weight=distill.weight, token_weight=distill.token_weight)
    elif config.data.token_labels:
        found = objectives.token_label_loss(config.data.token_weight)
    else:
        found = objectives.classification_loss()
    if plan.reductions and plan.counts[-1] == plan.patches:  # tokens are masked, not dropped
        found = Objective((*found.terms, objectives.keep_ratio_loss(plan.kept_fractions, config.reducer.share_weight)))
    return found


def _place(config):
    """The key that names the teacher, where it is, and whether it is the average there.

    By default a model that learns from itself learns from what it begins as.
    """
    if config.distill.kind == 'self' and not config.teacher.path:
        return 'init_from', config.init_from, config.init_ema
    return 'teacher.path', config.teacher.path, config.teacher.ema
