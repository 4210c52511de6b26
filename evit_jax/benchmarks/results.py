"""Accuracy, cost and speed of models from the files that runs and measurements leave."""

import json
import os
from collections.abc import Sequence
from typing import Any

from evit_jax.pictures.result import Result
from evit_jax.training import storage, writers
from evit_jax.training import workdir as workdirs


def read_results(paths: Sequence[str | os.PathLike], *, ema: bool = False) -> tuple[list[Result], int]:
    """Reads workdirs of runs, and JSON files with rows of measurements.

    A run says what its last full evaluation found. A row has any of name (or case), model, rate, top1 (fraction or
    percent), macs and images_per_second; without top1 it gives its speed to the run with the same MACs, of several the
    fastest.

    Args:
      ema: accuracy of the moving average of a run's weights.

    Returns:
      What has an accuracy, and the number of rows that found none.

    Raises:
      ValueError, OSError: a file is not there or not what is expected.
    """
    found, speeds = [], []
    for path in paths:
        place = storage.place(path)
        if not place.exists():
            raise FileNotFoundError(f'there is no {path}: give workdirs of runs and JSON files of measurements')
        if place.is_dir() or place.suffix == '.jsonl':
            found.append(_of_run(place if place.is_dir() else place.parent, ema))
            continue
        for row in _rows(path):
            (found if row.top1 is not None else speeds).append(row)
    lost = 0
    for row in speeds:
        same = [number for number, result in enumerate(found) if row.macs and result.macs == row.macs]
        lost += not same
        for number in same:
            before = found[number]
            fastest = max(row.speed or 0, before.speed or 0) if before.measured else row.speed
            found[number] = before._replace(speed=fastest, measured=True)
    return found, lost


def _of_run(workdir: Any, ema: bool) -> Result:
    if not (workdir / writers.METRICS_FILE).exists():
        raise FileNotFoundError(f'{workdir} is no workdir of a run: it has no {writers.METRICS_FILE}')
    evaluations = [record for record in writers.read_metrics(workdir / writers.METRICS_FILE) if 'eval/macs' in record]
    if not evaluations:
        raise ValueError(f'the run in {workdir} has not been evaluated to its end yet')
    last, name = evaluations[-1], 'eval/top1_ema' if ema else 'eval/top1'
    if name not in last:
        raise ValueError(f'the run in {workdir} kept no moving average: leave --ema out')
    told = workdirs.saved_config(workdir) or {}
    rates = told.get('keep.tokens') or told.get('keep.rates') or [told.get('keep.rate', 1.0)]
    series = told.get('model.name', workdir.name) + ('' if told.get('model.fuse', True) else ', not fused')
    return Result(series, '/'.join(f'{rate:g}' for rate in rates), last[name], last['eval/macs'],
                  last.get('eval/images_per_second'))


def _rows(path: str | os.PathLike) -> list[Result]:
    with open(path, encoding='utf-8') as file:
        try:
            rows = json.load(file)['rows']
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path} is no JSON with "rows", as evit_jax.benchmark model --json writes it') from None
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ValueError(f'{path} has no rows')
    ours = (row for row in rows if row.get('step') != 'train' and row.get('engine', 'jax') == 'jax')
    return [_of_row(path, row) for row in ours]


def _of_row(path: str | os.PathLike, row: dict[str, Any]) -> Result:
    values = [row.get(name) for name in ('top1', 'macs', 'images_per_second')]
    if wrong := [value for value in values if not (value is None or (isinstance(value, int | float) and value >= 0))]:
        raise ValueError(f'{path}: {wrong[0]!r} is neither an accuracy, nor MACs, nor images a second')
    top1, macs, speed = values
    name = str(row.get('name') or row.get('case') or row.get('model') or os.path.basename(path))
    rate = row.get('rate')
    series = str(row.get('model', name)) + (', not fused' if row.get('fused') is False and rate != 1 else '')
    return Result(series, name if rate is None else f'{rate:g}', top1 / 100 if top1 and top1 > 1 else top1, macs, speed,
                  measured=True)
