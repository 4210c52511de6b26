"""Accuracy, cost and speed of models from the files that runs, evaluations and measurements leave."""

import collections
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax.benchmarks.evaluated import Evaluated, Identity, evaluated_in, evaluation_of
from evit_jax.runtime import storage
from evit_jax.viz.result import Result

_SHOWN = 8  # plans in a message


class Results(NamedTuple):
    """Everything that has an accuracy, and the speeds that belong to none of it."""

    results: list[Result]
    unmatched: list[str]  # speeds, in words
    evaluated: list[str]  # what they were compared with, in words

    def explain(self) -> str:
        """The plans of both sides."""
        return (f'measured: {_some(self.unmatched)}; evaluated: {_some(self.evaluated)}. A speed belongs to the '
                'evaluations of the same model, image size and plan: measure the run itself (python -m '
                'evit_jax.benchmark model --models=WORKDIR), or evaluate it under the measured plan (python -m '
                'evit_jax.main --mode=evaluate)')


def read_results(paths: Sequence[str | os.PathLike], *, ema: bool = False) -> Results:
    """Reads workdirs of runs, files of evaluations, and JSON files with rows of measurements.

    A workdir has its last full evaluation and its `evaluate-*.json`. A row has any of name (or case), model, rate,
    top1, macs, images_per_second, image_size, plan and run. Where any top1 of a file is above 1, all of them are in
    percent; otherwise they are fractions. A row without top1 gives its speed to the evaluations of the same model,
    image size and plan; without a plan, to those with the same MACs. Of several rows the fastest counts. Where a speed
    is joined, the speeds of evaluations, which include reading the images, are left out.

    Args:
      ema: accuracy of the moving average of a run's weights.

    Raises:
      ValueError, OSError: a file is not there or not what is expected; none of the speeds belongs to an accuracy.
    """
    found, speeds = [], []
    for path in paths:
        place = storage.as_path(path)
        if not place.exists():
            raise FileNotFoundError(f'there is no {path}: give workdirs of runs and JSON files of measurements')
        if place.is_dir() or place.suffix == '.jsonl':
            found += evaluated_in(place if place.is_dir() else place.parent, ema)
            continue
        told = _read(path)
        if 'metrics' in told:
            found.append(evaluation_of(place, ema))
            continue
        rows = _rows(path, told)
        found += [row for row in rows if row.result.top1 is not None]
        speeds += [row for row in rows if row.result.top1 is None and row.result.speed is not None]
    found = _told_apart(found)
    runs, unmatched = {one.run for one in found}, []
    for speed in speeds:
        same = [number for number, one in enumerate(found) if _same(speed, one, runs)]
        for number in same:
            found[number] = found[number]._replace(result=_with_speed(found[number].result, speed.result.speed))
        if not same:
            unmatched.append(str(speed))
    joined = len(unmatched) < len(speeds)
    results = [one.result if one.result.measured or not joined else one.result._replace(speed=None) for one in found]
    read = Results(results, unmatched, [str(one) for one in found])
    if found and speeds and not joined:
        raise ValueError(f'none of the {len(speeds)} speeds belongs to an evaluation: {read.explain()}')
    return read


def _same(speed: Evaluated, one: Evaluated, runs: set[str]) -> bool:
    """True where a speed is that of an evaluation."""
    if speed.run in runs and speed.run != one.run:
        return False
    macs = speed.result.macs, one.result.macs
    if speed.identity.plan and one.identity.plan:
        return speed.identity == one.identity and (None in macs or macs[0] == macs[1])
    models = {speed.identity.model, one.identity.model} - {''}
    return bool(macs[0]) and macs[0] == macs[1] and len(models) < 2


def _with_speed(result: Result, speed: float | None) -> Result:
    fastest = max(speed or 0, result.speed or 0) if result.measured else speed
    return result._replace(speed=fastest, measured=True)


def _told_apart(found: Sequence[Evaluated]) -> list[Evaluated]:
    """Each once; the lines of runs bear the runs' names, where there are several runs and one has a line."""
    found = list(dict.fromkeys(found))
    points = collections.Counter(one.run for one in found)
    if len(points) < 2 or all(points[run] < 2 for run in points if run):
        return found
    return [one._replace(result=one.result._replace(series=f'{one.result.series} ({os.path.basename(one.run)})'))
            if one.run else one for one in found]


def _read(path: str | os.PathLike) -> dict[str, Any]:
    with open(path, encoding='utf-8') as file:
        try:
            told = json.load(file)
        except ValueError:
            told = None
    if not isinstance(told, dict) or not {'rows', 'metrics'} & told.keys():
        raise ValueError(f'{path} is no JSON with "rows", as evit_jax.benchmark model --json writes it')
    return told


def _rows(path: str | os.PathLike, told: dict[str, Any]) -> list[Evaluated]:
    kind, rows = told.get('measurement', 'model'), told['rows']
    if kind != 'model':
        raise ValueError(f'{path} holds the measurement of {kind}, by evit_jax.benchmark {kind}: give what '
                         'evit_jax.benchmark model --json has written')
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'{path} has no rows')
    for row in rows:
        _check_row(path, row)
    ours = [row for row in rows if row.get('step') != 'train' and row.get('engine', 'jax') == 'jax']
    return [_of_row(path, row, _whole(path, rows)) for row in ours]


def _whole(path: str | os.PathLike, rows: Sequence[dict[str, Any]]) -> int:
    """The top1 in a file that stands for all images: 1, or 100 where one of them is in percent."""
    found = [row['top1'] for row in rows if row.get('top1') is not None]
    if max(found, default=0) <= 1:
        return 1
    if low := [top1 for top1 in found if 0 < top1 <= 1]:
        logging.warning('%s: top1 is in percent, as %g is above 1, so %g is read as %g %%', path, max(found), low[0],
                        low[0])
    return 100


def _check_row(path: str | os.PathLike, row: dict[str, Any]) -> None:
    values = [row.get(name) for name in ('top1', 'macs', 'images_per_second')]
    if wrong := [value for value in values if not (value is None or (isinstance(value, int | float) and value >= 0))]:
        raise ValueError(f'{path}: {wrong[0]!r} is neither an accuracy, nor MACs, nor images a second')
    if values[0] is not None and values[0] > 100:
        raise ValueError(f'{path}: top1 {values[0]:g} is above 100 %: give fractions of 1, or percent')
    for name, kind, wanted in (('rate', int | float, 'a number'), ('image_size', int, 'a whole number of pixels')):
        if not isinstance(row.get(name), kind | None):
            raise ValueError(f'{path}: {name} {row[name]!r} is not {wanted}')


def _of_row(path: str | os.PathLike, row: dict[str, Any], whole: int) -> Evaluated:
    top1, macs, speed = (row.get(name) for name in ('top1', 'macs', 'images_per_second'))
    name = str(row.get('name') or row.get('case') or row.get('model') or os.path.basename(path))
    rate = row.get('rate')
    series = str(row.get('model', name)) + (', not fused' if row.get('fused') is False and rate != 1 else '')
    result = Result(series, name if rate is None else f'{rate:g}', None if top1 is None else top1 / whole, macs, speed,
                    measured=True)
    run = os.path.realpath(os.path.expanduser(str(row['run']))) if row.get('run') else ''
    identity = Identity(str(row.get('model') or ''), row.get('image_size'), str(row.get('plan') or ''))
    return Evaluated(result, identity, run)


def _some(texts: Sequence[str]) -> str:
    texts = list(dict.fromkeys(texts))
    more = f' and {len(texts) - _SHOWN} more' if len(texts) > _SHOWN else ''
    return ' | '.join(texts[:_SHOWN]) + more or 'nothing'
