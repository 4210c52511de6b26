"""The evaluations in a workdir: the last one of its training, and those of other plans."""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.pictures.result import Result
from evit_jax.tokens.keeping import Keeping
from evit_jax.tokens.plan import TokenPlan
from evit_jax.training import storage, writers
from evit_jax.training import workdir as workdirs

_FILES = 'evaluate-*.json'
_NEAR = 0.01  # largest relative difference between the MACs of an evaluation and of its plan


class Identity(NamedTuple):
    """The model, image size and plan of an evaluation or a measurement."""

    model: str = ''
    image_size: int | None = None
    plan: str = ''  # text of the TokenPlan; '': unknown


class Evaluated(NamedTuple):
    """A result, with what identifies it; one without an accuracy is a speed."""

    result: Result
    identity: Identity
    run: str = ''  # resolved path of the workdir
    step: int | None = None    # step of the weights; None: unknown
    images: int | None = None  # in the split, those that cannot be read included

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
    return _of_one_step(workdir, found)


def _of_one_step(workdir: Any, found: list[Evaluated]) -> list[Evaluated]:
    """Leaves out evaluations of earlier weights and of other images, which belong to no common curve."""
    latest, kept = max(found, key=lambda one: -1 if one.step is None else one.step), []
    for one in found:
        if differ := [f'{name} {here} there, {there} in the latest' for name, here, there in (
                ('step', one.step, latest.step), ('images', one.images, latest.images))
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
    workdir = storage.place(told.get('workdir') or file.parent)
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
    return Evaluated(result, _identity(told, None, str(plan) if plan else ''), _resolved(workdir), record.get('step'),
                     _images(metrics))


def _of_file(workdir: Any, told: Mapping[str, Any], file: Any, ema: bool) -> Evaluated | None:
    """The evaluation of a plan; None for a file that holds none."""
    try:
        found = json.loads(file.read_text())
        metrics, plan = found['metrics'], found.get('plan') or {}
        plan = plan if isinstance(plan, dict) else {'description': str(plan)}
        size = (found.get('preprocessing') or {}).get('image_size')
        told = {**told, **({'model.name': found['model']['name']} if found.get('model') else {})}
        if not 0 <= metrics['top1'] <= 1 or not metrics['macs'] > 0:
            raise ValueError('top1 is outside [0, 1], or macs is not positive')
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logging.warning('%s is left out: it holds no evaluation (%s: %s)', file, type(error).__name__, error)
        return None
    description = str(plan.get('description') or '')
    label = _label(told, description) or '-'.join(map(str, plan.get('tokens') or ())) or file.stem
    result = _result(workdir, told, metrics, ema, label=label, fused=told.get('model.fuse', True))
    return Evaluated(result, _identity(told, size, description), _resolved(workdir), found.get('step'),
                     _images(metrics))


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
        shape = models.configured_shape(told)
        keeping, patches = Keeping.of_config(told), shape.patches(told['model.image_size'])
        keeping.plans(patches, shape.depth, shape.macs)(1.0)
    except (KeyError, ValueError):
        return None, lambda plan: 0

    def plan_at(rate):
        asked = keeping if rate is None else keeping.at(rate)
        return asked.plans(patches, shape.depth, shape.macs)(1.0)

    return plan_at, shape.macs


def _images(metrics):
    return metrics['images'] + metrics.get('left_out', 0) if 'images' in metrics else None


def _identity(told, size, plan):
    return Identity(told.get('model.name', ''), size or told.get('model.image_size'), plan)


def _resolved(workdir) -> str:
    return str(workdir.resolve())
