"""The evaluations in a workdir: the last one of its training, and those of other plans."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import splits
from evit_jax.metrics import writers
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import storage
from evit_jax.viz.result import Result

_FILES = 'evaluate-*.json'
_TYPES = {
    'metrics': dict.fromkeys(('top1', 'top1_ema', 'macs', 'images_per_second', 'images', 'left_out'), int | float),
    'plan': {'tokens': list | tuple}, 'model': {'name': str}, 'data': dict.fromkeys(('source', 'name', 'split'), str),
    'preprocessing': {'image_size': int, 'mean': list, 'std': list, 'eval_crop': int | float}}
_NEAR = 0.01  # largest relative difference between the MACs of an evaluation and of its plan


class Identity(NamedTuple):
    """The model, image size and plan of an evaluation or a measurement."""

    model: str = ''
    image_size: int | None = None
    plan: str = ''  # text of the TokenPlan; '': unknown


class Conditions(NamedTuple):
    """Everything but the plan that evaluations of one curve have in common; None where it is unknown."""

    step: int | None = None    # step of the weights
    images: int | None = None  # in the split, those that cannot be read included
    source: str | None = None
    dataset: str | None = None  # name of the tfds data set; '' for other sources
    split: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    eval_crop: float | None = None


class Evaluated(NamedTuple):
    """A result, with what identifies it; one without an accuracy is a speed."""

    result: Result
    identity: Identity
    run: str = ''  # resolved path of the workdir
    conditions: Conditions = Conditions()

    def __str__(self) -> str:
        if not self.identity.plan:
            return f'{self.result.series} {self.result.label} ({self.result.macs or "no"} MACs, plan unknown)'
        return f'{self.identity.model}, {self.identity.image_size} px, {self.identity.plan}'


def evaluated_in(workdir: Any, ema: bool) -> list[Evaluated]:
    """The evaluations in a workdir of the latest weights that were evaluated, each plan once.

    Args:
      ema: accuracy of the moving average of the weights.

    Raises:
      ValueError, OSError: there is none, or no moving average.
    """
    files, metrics = sorted(workdir.glob(_FILES)), workdir / writers.METRICS_FILE
    if not metrics.exists() and not files:
        raise FileNotFoundError(f'{workdir} is no workdir of a run: it has no {writers.METRICS_FILE}')
    told = workdirs.saved_config(workdir) or {}
    records = [record for record in (writers.read_metrics(metrics) if metrics.exists() else [])
               if 'eval/macs' in record]
    if not records and not files:
        raise ValueError(f'the run in {workdir} has not been evaluated to its end yet')
    found = [_of_training(workdir, told, records[-1], ema)] if records else []
    for file in files:
        one = _of_file(workdir, told, file, ema)
        if one and one.identity not in {before.identity for before in found}:
            found.append(one)
    if not found:
        raise ValueError(f'{workdir} has no evaluation that can be read')
    return _of_one_curve(workdir, found)


def _of_one_curve(workdir: Any, found: list[Evaluated]) -> list[Evaluated]:
    """Leaves out evaluations under other conditions than the latest one, which belong to no common curve."""
    latest, kept = max((one.conditions for one in found), key=lambda one: -1 if one.step is None else one.step), []
    for one in found:
        if differ := [f'{name} {here} there, {there} in the latest' for name, here, there in zip(
                Conditions._fields, one.conditions, latest, strict=True)
                if None not in (here, there) and here != there]:
            logging.warning('an evaluation in %s is left out (%s): %s. Evaluate it again', workdir, one,
                            '; '.join(differ))
        else:
            kept.append(one)
    return kept


def evaluation_of(file: Any, ema: bool) -> Evaluated:
    """The evaluation in a file that lies elsewhere than in the workdir, which it names.

    Raises:
      ValueError: it holds none.
    """
    told = json.loads(file.read_text())
    if not isinstance(told.get('workdir') or '', str):
        raise ValueError(f'{file}: "workdir": {json.dumps(told["workdir"])} is no path of a workdir')
    workdir = storage.as_path(told.get('workdir') or file.parent)
    if found := _of_file(workdir, workdirs.saved_config(workdir) or {}, file, ema):
        return found
    raise ValueError(f'{file} holds no evaluation: give what evit_jax.main --mode=evaluate has written')


def _of_training(workdir: Any, told: Mapping[str, Any], record: Mapping[str, Any], ema: bool) -> Evaluated:
    rates = told.get('keep.tokens') or told.get('keep.rates') or [told.get('keep.rate', 1.0)]
    metrics = {key.removeprefix('eval/'): value for key, value in record.items()}
    result = _result(workdir, told, metrics, ema, label='/'.join(f'{rate:g}' for rate in rates),
                     fused=told.get('model.fuse', True))
    plan_at, macs_of = _plans(told)
    plan = plan_at and plan_at(None)
    if plan and abs(macs_of(plan) / record['eval/macs'] - 1) > _NEAR:
        plan = None  # the config has changed since
    data = {'source': told.get('data.source'), 'name': told.get('data.name'), 'split': _split_of_training(told)}
    conditions = _conditions(record.get('step'), metrics, data, {
        name: told.get(f'data.{name}') for name in ('mean', 'std', 'eval_crop')})
    return Evaluated(result, _identity(told, None, str(plan) if plan else ''), _resolved(workdir), conditions)


def _split_of_training(told: Mapping[str, Any]) -> str | None:
    """The split of a run's evaluations by its saved config; None where that leaves it open."""
    split, recorded = told.get('data.test_split'), told.get('recorded', {}).get('test', {}).get('split')
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


def _of_file(workdir: Any, told: Mapping[str, Any], file: Any, ema: bool) -> Evaluated | None:
    """The evaluation of a plan; None for a file that holds none."""
    try:
        found = json.loads(file.read_text())
        metrics, plan = found['metrics'], found.get('plan') or {}
        plan = plan if isinstance(plan, dict) else {'description': str(plan)}
        data, preprocessing = (found.get(name) or {} for name in ('data', 'preprocessing'))
        _check_types(found | {'plan': plan})
        conditions = _conditions(found.get('step'), metrics, data, preprocessing)
        told = {**told, **({'model.name': found['model']['name']} if found.get('model') else {})}
        if not 0 <= metrics['top1'] <= 1 or not metrics['macs'] > 0:
            raise ValueError('top1 is outside [0, 1], or macs is not positive')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning('%s is left out: it holds no evaluation (%s: %s)', file, type(error).__name__, error)
        return None
    description = str(plan.get('description') or '')
    label = _label(told, description) or '-'.join(map(str, plan.get('tokens') or ())) or file.stem
    result = _result(workdir, told, metrics, ema, label=label, fused=told.get('model.fuse', True))
    return Evaluated(result, _identity(told, preprocessing.get('image_size'), description), _resolved(workdir),
                     conditions)


def _check_types(found: Mapping[str, Any]) -> None:
    """Raises a ValueError for the first value of an evaluation that has another type than its key is for."""
    values = [('step', found.get('step'), int)] + [
        (f'{group}.{name}', (found.get(group) or {}).get(name), kind)
        for group, kinds in _TYPES.items() for name, kind in kinds.items()]
    for name, value, kind in values:
        if value is not None and not isinstance(value, kind):
            raise ValueError(f'{name} is {value!r}')


def _result(workdir, told, metrics, ema, *, label, fused) -> Result:
    name = 'top1_ema' if ema else 'top1'
    if name not in metrics:
        raise ValueError(f'the run in {workdir} kept no moving average: leave --ema out')
    series = told.get('model.name', workdir.name) + ('' if fused else ', not fused')
    return Result(series, label, metrics[name], metrics['macs'], metrics.get('images_per_second'))


def _label(told: Mapping[str, Any], description: str) -> str:
    """The keep rate that gives a plan, of those with two digits; '' if none does."""
    plan_at, _ = _plans(told)
    rates = [number / 100 for number in range(100, 0, -1)] if plan_at else []
    for rate in rates:
        try:
            if str(plan_at(rate)) == description:
                return f'{rate:g}'
        except ValueError:  # the reducer cannot keep so few
            break
    return ''


def _plans(told: Mapping[str, Any]) -> tuple[Callable[[float | None], TokenPlan] | None, Callable[[TokenPlan], int]]:
    """Keep rate (None: as trained) -> plan, and the MACs of a plan; nothing of a config that says too little."""
    try:
        config = models.config_from_flat(told)
        budget, patches = TokenBudget.of_config(told), config.patches(told['model.image_size'])
        budget.plans(patches, config.depth, config.macs)(1.0)
    except (KeyError, ValueError):
        return None, lambda plan: 0

    def plan_at(rate):
        asked = budget if rate is None else budget.at(rate)
        return asked.plans(patches, config.depth, config.macs)(1.0)

    return plan_at, config.macs


def _identity(told, size, plan):
    return Identity(told.get('model.name', ''), size or told.get('model.image_size'), plan)


def _resolved(workdir) -> str:
    return str(workdir.resolve())
