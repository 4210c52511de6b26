"""Creates the training objective of a flat config, and checks the values that it depends on."""

from collections.abc import Mapping
from typing import Any

from evit_jax import models
from evit_jax.models.config import ViTConfig
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction import registry
from evit_jax.reduction.plan import TokenPlan
from evit_jax.training import objectives
from evit_jax.training.distillation import KINDS
from evit_jax.training.objectives import Objective


def check(config: Mapping[str, Any], base: ViTConfig | None = None) -> None:
    """Raises a ValueError if values contradict each other. Reads no files.

    Args:
      base: model config to use instead of the named model's.
    """
    kind, token_weight = config['distill.kind'], config['distill.token_weight']
    if kind in ('hard', 'soft') and not config['model.distilled']:
        raise ValueError(f'config.distill.kind={kind} trains a distillation token, which this model lacks: give '
                         '--config.model.distilled=True, or --config.distill.kind=self to train the class token')
    if kind in ('hard', 'soft') and config['model.one_head']:
        raise ValueError(f'config.distill.kind={kind} trains the head of the distillation token, which this model '
                         'lacks: give --config.model.one_head=False, or --config.distill.kind=self')
    if kind == 'none' and config['teacher.path']:
        raise ValueError(f'the teacher in {config["teacher.path"]} is not used: give --config.distill.kind='
                         f'{", ".join(KINDS[1:-1])} or {KINDS[-1]}, or no config.teacher.path')
    if kind == 'self' and token_weight and not config['teacher.dense']:
        raise ValueError(f'config.distill.token_weight={token_weight} compares tokens with those of a teacher '
                         'that drops none: give --config.teacher.dense=True, or --config.distill.token_weight=0')
    _check_token_labels(config, base)
    learned = registry.get_reducer(config['reducer.name']).is_learned
    if config['model.freeze'] and learned:
        raise ValueError(f'config.model.freeze={config["model.freeze"]} trains only the heads, but reducer '
                         f'{config["reducer.name"]} trains its predictors through the backbone: give another '
                         '--config.reducer.name, or --config.model.freeze=')
    scaled = config['optimizer.backbone_scale'] != 1 or config['optimizer.backbone_from_epoch']
    if scaled and not learned:
        raise ValueError('config.optimizer.backbone_scale and backbone_from_epoch are for all parameters but '
                         f'those of the reducer, and reducer {config["reducer.name"]} has none: leave them at 1 and 0')


def _check_token_labels(config, base):
    if not (maps := config['data.token_labels']):
        return
    name, kind = config['model.name'], config['distill.kind']
    if not isinstance(base or models.get_config(name), LVViTConfig):
        raise ValueError(f'config.data.token_labels={maps} needs a model with a head for patch tokens, which {name} '
                         'lacks: give an lvvit, or --config.data.token_labels=')
    if kind != 'none':
        raise ValueError(f'config.distill.kind={kind} and config.data.token_labels both decide the '
                         'objective: give one of them')
    if config['mixing.mixup'] or config['mixing.cutmix']:
        raise ValueError('with config.data.token_labels, MixToken replaces mixup and cutmix: give '
                         '--config.mixing.mixup=0 --config.mixing.cutmix=0')


def objective(config: Mapping[str, Any], plan: TokenPlan) -> Objective:
    """Returns the training objective under a plan."""
    kind = config['distill.kind']
    if kind in ('hard', 'soft'):
        objective = objectives.distillation_loss(kind, alpha=config['distill.alpha'], tau=config['distill.tau'])
    elif kind == 'self':
        objective = objectives.self_distillation_loss(weight=config['distill.weight'],
                                                      token_weight=config['distill.token_weight'])
    elif config['data.token_labels']:
        objective = objectives.token_label_loss(config['data.token_weight'])
    else:
        objective = objectives.classification_loss()
    if plan.masks_tokens:
        keep_ratio = objectives.keep_ratio_loss(plan.kept_fractions, config['reducer.share_weight'])
        objective = Objective((*objective.terms, keep_ratio))
    return objective
