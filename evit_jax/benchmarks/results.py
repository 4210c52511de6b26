"""Reads accuracies, costs and speeds of models from files of runs, evaluations and benchmarks, and joins them."""

import collections
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.benchmarks.evaluations import Evaluated, Identity, evaluated_in, evaluation_of, is_image_size
from evit_jax.models.config import as_hw, as_size
from evit_jax.runtime import storage
from evit_jax.viz.tradeoff import Result

_MAX_LISTED = 8  # maximum number of plans in a message


class Results(NamedTuple):
    """Results with an accuracy, and descriptions of the speeds that match no result."""

    results: list[Result]
    unmatched: list[str]  # descriptions of the speeds without an evaluation
    evaluated: list[str]  # descriptions of the evaluations

    def explain(self) -> str:
        """Returns a message that lists the unmatched speeds, the evaluations and the way out."""
        return (f'measured: {_listed(self.unmatched)}; evaluated: {_listed(self.evaluated)}. A speed belongs to the '
                'evaluations of the same model, image size and plan: measure the run itself (python -m '
                'evit_jax.benchmark model --models=WORKDIR), or evaluate it under the measured plan (python -m '
                'evit_jax.main --mode=evaluate)')


def read_results(paths: Sequence[str | os.PathLike], *, ema: bool = False) -> Results:
    """Reads workdirs of runs, files of evaluations, and JSON files with rows of measurements.

    A workdir contributes its last full evaluation and its `evaluate-*.json`. A row may have the keys name (or case),
    model, rate, top1, macs, images_per_second, image_size, plan and run. If any top1 in a file is above 1, all values
    in the file are percentages; otherwise they are fractions.

    A row without top1 is a measured speed. It is joined to the evaluations of the same model, image size and plan. If
    the row has no plan, it is joined to evaluations with the same MACs. The fastest of several rows is used. The speed
    of an evaluation includes reading the images, so it is dropped if any measured speed is joined.

    Args:
      paths: workdirs and files.
      ema: if True, use the accuracy of the EMA weights of a run.

    Raises:
      ValueError, OSError: a file is missing or malformed, or no speed matches an evaluation.
    """
    evaluations, speeds = [], []
    for name in paths:
        path = storage.as_path(name)
        if not path.exists():
            raise FileNotFoundError(f'there is no {name}: give workdirs of runs and JSON files of measurements')
        if path.is_dir() or path.suffix == '.jsonl':
            evaluations += evaluated_in(path if path.is_dir() else path.parent, ema)
            continue
        content = _read(name)
        if 'metrics' in content:
            evaluations.append(evaluation_of(path, ema))
            continue
        rows = _rows(name, content)
        evaluations += [row for row in rows if row.result.top1 is not None]
        speeds += [row for row in rows if row.result.top1 is None and row.result.speed is not None]
    return _join(_distinct_series(evaluations), speeds)


def _join(evaluations: list[Evaluated], speeds: Sequence[Evaluated]) -> Results:
    """Joins speeds to the evaluations that they match."""
    descriptions = [str(evaluation) for evaluation in evaluations]
    runs, unmatched = {evaluation.run for evaluation in evaluations}, []
    for speed in speeds:
        matching = [number for number, evaluation in enumerate(evaluations) if _match(speed, evaluation, runs)]
        for number in matching:
            evaluations[number] = evaluations[number]._replace(
                result=_with_speed(evaluations[number].result, speed.result.speed))
        if not matching:
            unmatched.append(str(speed))
    joined = len(unmatched) < len(speeds)
    results = [evaluation.result if evaluation.result.measured or not joined else evaluation.result._replace(speed=None)
               for evaluation in evaluations]
    read = Results(results, unmatched, descriptions)
    if evaluations and speeds and not joined:
        raise ValueError(f'none of the {len(speeds)} speeds belongs to an evaluation: {read.explain()}')
    return read


def _match(speed: Evaluated, evaluation: Evaluated, runs: set[str]) -> bool:
    """Returns True if a speed was measured for the model and plan of an evaluation."""
    if speed.run in runs and speed.run != evaluation.run:
        return False
    macs = speed.result.macs, evaluation.result.macs
    if speed.identity.plan and evaluation.identity.plan:
        return speed.identity == evaluation.identity and (None in macs or macs[0] == macs[1])
    models = {speed.identity.model, evaluation.identity.model} - {''}
    return bool(macs[0]) and macs[0] == macs[1] and len(models) < 2


def _with_speed(result: Result, speed: float | None) -> Result:
    fastest = max(speed or 0, result.speed or 0) if result.measured else speed
    return result._replace(speed=fastest, measured=True)


def _distinct_series(evaluations: Sequence[Evaluated]) -> list[Evaluated]:
    """Drops duplicates. If there are several runs, and one has several points, adds the run's name to each series."""
    evaluations = list(dict.fromkeys(evaluations))
    points = collections.Counter(evaluation.run for evaluation in evaluations)
    if len(points) < 2 or all(points[run] < 2 for run in points if run):
        return evaluations
    return [evaluation._replace(result=evaluation.result._replace(
        series=f'{evaluation.result.series} ({os.path.basename(evaluation.run)})')) if evaluation.run else evaluation
        for evaluation in evaluations]


def _read(path: str | os.PathLike) -> dict[str, Any]:
    with open(path, encoding='utf-8') as file:
        try:
            content = json.load(file)
        except ValueError:
            content = None
    if not isinstance(content, dict) or not {'rows', 'metrics'} & content.keys():
        raise ValueError(f'{path} is no JSON with "rows", as evit_jax.benchmark model --json writes it')
    return content


def _rows(path: str | os.PathLike, content: dict[str, Any]) -> list[Evaluated]:
    kind, rows = content.get('measurement', 'model'), content['rows']
    if kind != 'model':
        raise ValueError(f'{path} holds the measurement of {kind}, by evit_jax.benchmark {kind}: give what '
                         'evit_jax.benchmark model --json has written')
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'{path} has no rows')
    for row in rows:
        _check_row(path, row)
    ours = [row for row in rows if row.get('step') != 'train' and row.get('engine', 'jax') == 'jax']
    return [_from_row(path, row, _top1_scale(path, rows)) for row in ours]


def _top1_scale(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> int:
    """Returns the largest possible top1 in a file: 100 if any value is above 1, otherwise 1."""
    values = [row['top1'] for row in rows if row.get('top1') is not None]
    if max(values, default=0) <= 1:
        return 1
    if low := [top1 for top1 in values if 0 < top1 <= 1]:
        logging.warning('%s: top1 is in percent, as %g is above 1, so %g is read as %g %%', path, max(values), low[0],
                        low[0])
    return 100


def _check_row(path: str | os.PathLike, row: dict[str, Any]) -> None:
    values = [row.get(name) for name in ('top1', 'macs', 'images_per_second')]
    if wrong := [value for value in values if not (value is None or (isinstance(value, int | float) and value >= 0))]:
        raise ValueError(f'{path}: {wrong[0]!r} is neither an accuracy, nor MACs, nor images a second')
    if values[0] is not None and values[0] > 100:
        raise ValueError(f'{path}: top1 {values[0]:g} is above 100 %: give fractions of 1, or percent')
    if not isinstance(row.get('rate'), int | float | None):
        raise ValueError(f'{path}: rate {row["rate"]!r} is not a number')
    if row.get('image_size') is not None and not is_image_size(row['image_size']):
        raise ValueError(f'{path}: image_size {row["image_size"]!r} is neither a number of pixels nor height and width')


def _from_row(path: str | os.PathLike, row: dict[str, Any], scale: int) -> Evaluated:
    top1, macs, speed = (row.get(name) for name in ('top1', 'macs', 'images_per_second'))
    name = str(row.get('name') or row.get('case') or row.get('model') or os.path.basename(path))
    rate = row.get('rate')
    series = str(row.get('model', name)) + (', not fused' if row.get('fused') is False and rate != 1 else '')
    result = Result(series, name if rate is None else f'{rate:g}', None if top1 is None else top1 / scale, macs, speed,
                    measured=True)
    run = os.path.realpath(os.path.expanduser(str(row['run']))) if row.get('run') else ''
    size = row.get('image_size')
    identity = Identity(str(row.get('model') or ''), size and as_size(as_hw(size)), str(row.get('plan') or ''))
    return Evaluated(result, identity, run)


def _listed(texts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(texts))
    more = f' and {len(texts) - _MAX_LISTED} more' if len(texts) > _MAX_LISTED else ''
    return ' | '.join(texts[:_MAX_LISTED]) + more or 'nothing'
