"""Reads the evaluations in a workdir: the last evaluation of the training, and evaluations under other plans."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import saved_budget
from evit_jax.data import splits
from evit_jax.metrics import writers
from evit_jax.models.config import ImageSize, as_hw, as_size, size_text
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import storage
from evit_jax.viz.tradeoff import Result

_FILES = 'evaluate-*.json'
_TYPES = {
    'metrics': dict.fromkeys(('top1', 'top1_ema', 'macs', 'images_per_second', 'images', 'left_out'), int | float),
    'plan': {'tokens': list | tuple}, 'model': {'name': str}, 'data': dict.fromkeys(('source', 'name', 'split'), str),
    'preprocessing': {'image_size': int | list, 'mean': list, 'std': list, 'eval_crop': int | float}}
_MAX_MACS_DIFFERENCE = 0.01  # largest relative difference of MACs between an evaluation and its plan


class Identity(NamedTuple):
    """The model, image size and plan of an evaluation or a measurement."""

    model: str = ''
    image_size: ImageSize | None = None
    plan: str = ''  # str(TokenPlan); '' if unknown


class Conditions(NamedTuple):
    """Conditions that all evaluations of a curve share. The plan is not one of them. None marks an unknown value."""

    step: int | None = None    # step of the weights
    images: int | None = None  # number of images in the split, including unreadable ones
    source: str | None = None
    dataset: str | None = None  # name of the TFDS dataset; '' for other sources
    split: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eval_crop: float | None = None


class Evaluated(NamedTuple):
    """A result with its identity. A result without accuracy is a measurement of speed."""

    result: Result
    identity: Identity
    run: str = ''  # resolved path of the workdir
    conditions: Conditions = Conditions()

    def __str__(self) -> str:
        if not self.identity.plan:
            return f'{self.result.series} {self.result.label} ({self.result.macs or "no"} MACs, plan unknown)'
        return f'{self.identity.model}, {size_text(self.identity.image_size or 0)} px, {self.identity.plan}'


def evaluated_in(workdir: Any, ema: bool) -> list[Evaluated]:
    """Returns the evaluations of the newest evaluated weights in a workdir, one for each plan.

    Args:
      ema: if True, use the accuracy of the EMA weights.

    Raises:
      ValueError, OSError: the workdir holds no evaluation, or `ema` is True and there are no EMA weights.
    """
    files, metrics = sorted(workdir.glob(_FILES)), workdir / writers.METRICS_FILE
    if not metrics.exists() and not files:
        raise FileNotFoundError(f'{workdir} is no workdir of a run: it has no {writers.METRICS_FILE}')
    config = workdirs.saved_config(workdir) or {}
    records = [record for record in (writers.read_metrics(metrics) if metrics.exists() else [])
               if 'eval/macs' in record]
    if not records and not files:
        raise ValueError(f'the run in {workdir} has no full evaluation yet')
    evaluations = [_from_training(workdir, config, records[-1], ema)] if records else []
    for file in files:
        evaluation = _from_file(workdir, config, file, ema)
        if evaluation and evaluation.identity not in {earlier.identity for earlier in evaluations}:
            evaluations.append(evaluation)
    if not evaluations:
        raise ValueError(f'{workdir} has no evaluation that can be read')
    return _same_conditions(workdir, evaluations)


def _same_conditions(workdir: Any, evaluations: list[Evaluated]) -> list[Evaluated]:
    """Returns the evaluations with the same conditions as the latest one. The others are skipped with a warning."""
    latest = max((evaluation.conditions for evaluation in evaluations),
                 key=lambda conditions: -1 if conditions.step is None else conditions.step)
    result = []
    for evaluation in evaluations:
        if differences := [f'{name} {value} there, {expected} in the latest' for name, value, expected in zip(
                Conditions._fields, evaluation.conditions, latest, strict=True)
                if None not in (value, expected) and value != expected]:
            logging.warning('an evaluation in %s is left out (%s): %s. Evaluate it again', workdir, evaluation,
                            '; '.join(differences))
        else:
            result.append(evaluation)
    return result


def evaluation_of(file: Any, ema: bool) -> Evaluated:
    """Returns the evaluation in a file outside of its workdir. The file contains the path of the workdir.

    Raises:
      ValueError: the file holds no evaluation.
    """
    content = json.loads(file.read_text())
    if not isinstance(content.get('workdir') or '', str):
        raise ValueError(f'{file}: "workdir": {json.dumps(content["workdir"])} is no path of a workdir')
    workdir = storage.as_path(content.get('workdir') or file.parent)
    if evaluation := _from_file(workdir, workdirs.saved_config(workdir) or {}, file, ema):
        return evaluation
    raise ValueError(f'{file} holds no evaluation: give a file that evit_jax.main --mode=evaluate has written')


def _from_training(workdir: Any, config: Mapping[str, Any], record: Mapping[str, Any], ema: bool) -> Evaluated:
    """Returns the evaluation in a record of the training metrics."""
    rates = config.get('keep.tokens') or config.get('keep.rates') or [config.get('keep.rate', 1.0)]
    metrics = {key.removeprefix('eval/'): value for key, value in record.items()}
    result = _result(workdir, config, metrics, ema, label='/'.join(f'{rate:g}' for rate in rates),
                     fused=config.get('model.fuse', True))
    plan_at, macs_of = _plans(config)
    plan = plan_at and plan_at(None)
    if plan and abs(macs_of(plan) / record['eval/macs'] - 1) > _MAX_MACS_DIFFERENCE:
        plan = None  # the config has changed since the evaluation
    data = {'source': config.get('data.source'), 'name': config.get('data.name'), 'split': _training_split(config)}
    conditions = _conditions(record.get('step'), metrics, data, {
        name: config.get(f'data.{name}') for name in ('mean', 'std', 'eval_crop')})
    return Evaluated(result, _identity(config, None, str(plan) if plan else ''), _resolved(workdir), conditions)


def _training_split(config: Mapping[str, Any]) -> str | None:
    """Returns the evaluation split in a run's saved config; None if the config does not determine it."""
    split, recorded = config.get('data.test_split'), config.get('recorded', {}).get('test', {}).get('split')
    if split == splits.AUTO:
        split = recorded and splits.resolve(split, [recorded])
    return splits.title(split) if split else None


def _conditions(step: int | None, metrics: Mapping[str, Any], data: Mapping[str, Any],
                preprocessing: Mapping[str, Any]) -> Conditions:
    images = metrics['images'] + metrics.get('left_out', 0) if 'images' in metrics else None
    source = data.get('source')
    mean, std = (tuple(map(float, preprocessing.get(name) or ())) or None for name in ('mean', 'std'))
    return Conditions(step, images, source, data.get('name') if source == 'tfds' else source and '', data.get('split'),
                      mean, std, preprocessing.get('eval_crop'))


def _from_file(workdir: Any, config: Mapping[str, Any], file: Any, ema: bool) -> Evaluated | None:
    """Returns the evaluation in a file. If the file holds none, logs a warning and returns None."""
    try:
        content = json.loads(file.read_text())
        metrics, plan = content['metrics'], content.get('plan') or {}
        plan = plan if isinstance(plan, dict) else {'description': str(plan)}
        data, preprocessing = (content.get(name) or {} for name in ('data', 'preprocessing'))
        _check_types(content | {'plan': plan})
        conditions = _conditions(content.get('step'), metrics, data, preprocessing)
        config = {**config, **({'model.name': content['model']['name']} if content.get('model') else {})}
        if not 0 <= metrics['top1'] <= 1 or not metrics['macs'] > 0:
            raise ValueError('top1 is outside [0, 1], or macs is not positive')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning('%s is left out: it holds no evaluation (%s: %s)', file, type(error).__name__, error)
        return None
    description = str(plan.get('description') or '')
    label = _rate_label(config, description) or '-'.join(map(str, plan.get('tokens') or ())) or file.stem
    result = _result(workdir, config, metrics, ema, label=label, fused=config.get('model.fuse', True))
    return Evaluated(result, _identity(config, preprocessing.get('image_size'), description), _resolved(workdir),
                     conditions)


def is_image_size(value: Any) -> bool:
    """Returns True for a number of pixels, or a list of height and width."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int for side in sides)


def _check_types(content: Mapping[str, Any]) -> None:
    """Raises a ValueError if a value of an evaluation has a wrong type."""
    values = [('step', content.get('step'), int)] + [
        (f'{group}.{name}', (content.get(group) or {}).get(name), kind)
        for group, kinds in _TYPES.items() for name, kind in kinds.items()]
    for name, value, kind in values:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f'{name} is {value!r}')
    size = (content.get('preprocessing') or {}).get('image_size')
    if size is not None and not is_image_size(size):
        raise ValueError(f'preprocessing.image_size is {size!r}')


def _result(workdir, config, metrics, ema, *, label, fused) -> Result:
    name = 'top1_ema' if ema else 'top1'
    if name not in metrics:
        raise ValueError(f'the run in {workdir} has no EMA weights: leave --ema out')
    series = config.get('model.name', workdir.name) + ('' if fused else ', not fused')
    return Result(series, label, metrics[name], metrics['macs'], metrics.get('images_per_second'))


def _rate_label(config: Mapping[str, Any], description: str) -> str:
    """Returns the keep rate of the plan with this description; '' if no multiple of 0.01 gives the plan."""
    plan_at, _ = _plans(config)
    rates = [number / 100 for number in range(100, 0, -1)] if plan_at else []
    for rate in rates:
        try:
            if str(plan_at(rate)) == description:
                return f'{rate:g}'
        except ValueError:  # the reducer cannot keep so few tokens
            break
    return ''


def _plans(config: Mapping[str, Any]) -> tuple[Callable[[float | None], TokenPlan] | None, Callable[[TokenPlan], int]]:
    """Returns two functions: keep rate -> plan, and plan -> MACs.

    The first function maps None to the trained plan. It is None if the saved config is incomplete.
    """
    try:
        model_config = models.config_from_flat(config)
        budget, patches = saved_budget(config), model_config.patches(models.image_size_of(config))
        budget.plans(patches, model_config.depth, model_config.macs)(1.0)
    except (KeyError, ValueError):
        return None, lambda plan: 0

    def plan_at(rate):
        requested = budget if rate is None else budget.at(rate)
        return requested.plans(patches, model_config.depth, model_config.macs)(1.0)

    return plan_at, model_config.macs


def _identity(config, image_size, plan):
    size = as_size(as_hw(image_size)) if image_size else models.image_size_of(config)
    return Identity(config.get('model.name', ''), size, plan)


def _resolved(workdir) -> str:
    return str(workdir.resolve())
