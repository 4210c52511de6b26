"""Measures models on one GPU within a time limit: attention, then groups of workloads, the most important first.

Each group is compiled and timed interleaved. The time limit is checked before each group, so the measured groups are
whole. DINOv2's ViT-S has random weights here, which are as fast.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from absl import logging

from evit_jax import models
from evit_jax.benchmarks import attention_speed, model_speed
from evit_jax.benchmarks.benchmark_model import BenchmarkModel
from evit_jax.benchmarks.workloads import Workload, is_for, reductions_of_plans
from evit_jax.models.config import ImageSize, ViTConfig
from evit_jax.reduction.budget import TokenBudget
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import EVIT, TOME
from evit_jax.training.experiment import Experiment

DINOV2_S = ViTConfig(image_size=518, patch_size=14, classes=0, layer_scale=1.0)
_RATES = 0.7, 0.5
_TOME_MACS = 0.5  # r of ToMe: the smallest with at most this fraction of the dense model's MACs


class MeasuredModel(NamedTuple):
    """A model at one image size. Larger sizes are measured after smaller ones of other models."""

    name: str
    image_size: ImageSize
    config: ViTConfig | None = None  # None: the config of the named model
    trained: bool = False            # True to measure the training step, too


MODELS = (MeasuredModel('deit_s', 224, trained=True), MeasuredModel('dinov2_s', 518, DINOV2_S),
          MeasuredModel('deit_b', 224, trained=True), MeasuredModel('dinov2_s', 224, DINOV2_S),
          MeasuredModel('deit_s', 512), MeasuredModel('deit_b', 512))


class Limits(NamedTuple):
    """The batch sizes and the time limit."""

    batch_sizes: tuple[int, ...] = (64, 1, 256)  # in the order of importance
    train_batch: int = 64
    minutes: float = 8.0
    dtype: str = 'bfloat16'
    rounds: int = 7
    group_seconds: float = 12.0  # time of the measurements of a group, without compiling


def groups(measured: Sequence[MeasuredModel], limits: Limits,
           plans: Sequence[PlanFile] = ()) -> Iterator[list[Workload]]:
    """Yields the groups of workloads, the most important first.

    Args:
      plans: plan files, measured with the models whose architecture they are for.
    """
    for batch, model in itertools.product(limits.batch_sizes[:1], measured):
        yield _group(model, limits, batch, plans)
    for model in measured:
        if model.trained:
            yield [each._replace(train=True) for each in _group(model, limits, limits.train_batch, plans)]
    for batch, model in itertools.product(limits.batch_sizes[1:], measured):
        yield _group(model, limits, batch, plans)


def _group(model, limits, batch, plans) -> list[Workload]:
    config = model.config or models.get_config(model.name)
    dense = Workload(model.name, 1.0, False, model.image_size, batch, limits.dtype, (), run_config=model.config)
    rates = [dense._replace(rate=rate, fused=True, reduce_at=config.default_reduce_at) for rate in _RATES]
    known = BenchmarkModel(model.name, config, model.image_size, limits.dtype, TokenBudget(EVIT, (), True, ()))
    own = [plan for plan in plans if is_for(plan, known)]
    return [dense, *rates, _tome(dense), *(dense._replace(**reduction) for reduction in
                                           reductions_of_plans(own, known, model.image_size, [EVIT]))]


def _tome(dense: Workload) -> Workload:
    """Returns the workload of ToMe with the smallest r that reaches `_TOME_MACS`."""
    merged = dense._replace(reducer=TOME, reduce_at=tuple(range(dense.config.depth)))
    most = dense.plan.patches // 2
    return next((each for r in range(1, most) if (each := merged._replace(r=r)).macs <= _TOME_MACS * dense.macs),
                merged._replace(r=most))


def measure(measured: Sequence[MeasuredModel], limits: Limits, *, against: Sequence[str],
            plans: Sequence[PlanFile] = (), setup_run: Callable[[Workload], Experiment],
            on_group: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures attention, then as many groups as the time limit allows.

    Args:
      against: other engines for the groups at inference; see `model_speed.measure`.
      plans: see `groups`.
      setup_run: see `model_speed.measure`.
      on_group: called with the measurement so far after each group.

    Returns:
      The measurement as a dict for JSON: `attention`, `left_out`, and the content of `model_speed.measure`.
    """
    begin, longest = time.monotonic(), 0.0
    result = {'attention': attention_speed.measure(limits.dtype), 'left_out': [], 'rows': []}
    for group in groups(measured, limits, plans):
        left = limits.minutes * 60 - (time.monotonic() - begin)
        if left < longest or left <= 0:
            result['left_out'] += [str(workload) for workload in group]
            continue
        since = time.monotonic()
        part = model_speed.measure(group, rounds=limits.rounds, seconds=limits.group_seconds,
                                   against=() if group[0].train else against, setup_run=setup_run)
        longest = max(longest, time.monotonic() - since)
        result |= part | {'rows': result['rows'] + part['rows']}
        on_group(result)
        logging.info('%d programs measured, %.0f s of %.0f s', len(result['rows']), time.monotonic() - begin,
                     limits.minutes * 60)
    if not result['rows']:
        raise ValueError(f'no group was measured within {limits.minutes:g} minutes: give more --minutes')
    return result
