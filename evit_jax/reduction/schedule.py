"""The keep-rate schedule of training, quantised so that few programs are compiled.

EViT lowers the keep rate by a cosine at every step, which gives about 146 different shapes until the rate is 0.7. Here
the cosine is quantised to `levels` values, with one program each. No step keeps fewer tokens than the exact cosine. (A
departure from the reference, to limit compilation.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from evit_jax.reduction.plan import TokenPlan


class KeepSchedule(NamedTuple):
    """The steps in which the keep rate falls from 1 to its base value."""

    start: int   # first step of the cosine
    length: int  # number of steps of the cosine; 0: the rate drops to the base value at `start`
    levels: int  # number of programs; the first is dense, the last has the base rate


class Stage(NamedTuple):
    """A range of steps that run one program; it begins at step `start`."""

    start: int
    progress: float  # 0: all tokens are kept; 1: the base rate
    plan: TokenPlan


def progress(schedule: KeepSchedule, step: int) -> float:
    """Returns the progress of the exact cosine at a step, in [0, 1]. The keep rate is `1 - (1 - base) * progress`.

    Source: EViT, section 4 (implementation); adjust_keep_rate in youweiliang/evit, helpers.py.
    """
    done = step - schedule.start
    if done < 0:
        return 0.0
    if done >= schedule.length:
        return 1.0
    return (1 - math.cos(math.pi * done / schedule.length)) / 2


def stages(schedule: KeepSchedule, plan_at: Callable[[float], TokenPlan], total_steps: int) -> tuple[Stage, ...]:
    """Returns the stages of a run in order. Levels with equal plans share a stage.

    Args:
      plan_at: progress in [0, 1] -> plan.
      total_steps: number of steps in the run; later stages are left out.

    Raises:
      ValueError: the rate changes, and there are fewer than two levels.
    """
    if schedule.start <= 0 and schedule.length <= 0:
        return (Stage(0, 1.0, plan_at(1.0)),)
    if schedule.levels < 2:
        raise ValueError(f'levels={schedule.levels}: a keep rate that shrinks needs at least 2 levels, '
                         'or start at the base rate with start_epoch=0 and shrink_epochs=0')
    result = []
    for level in range(schedule.levels):
        fraction = level / (schedule.levels - 1)
        start = _first_step(schedule, fraction)
        plan = plan_at(fraction)
        if start >= total_steps:
            break
        if result and result[-1].start == start:
            result.pop()
        if not result or result[-1].plan != plan:
            result.append(Stage(start, fraction, plan))
    return tuple(result)


def _first_step(schedule, fraction):
    """Returns the first step at which the progress of the exact cosine reaches a fraction."""
    if fraction == 0:
        return 0
    low, high = schedule.start, schedule.start + max(schedule.length, 0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if progress(schedule, middle) >= fraction else (middle + 1, high)
    return low
