"""The keep-rate schedule of training, quantised so that few programs are compiled.

EViT shrinks the keep rate by a cosine, anew at every step; followed to the letter that gives about 146 different
shapes on the way to 0.7. Here the cosine takes `levels` values, each a program, and at no step are fewer tokens
kept than the exact cosine would keep. (A departure from the reference, for the compiler's sake.)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from evit_jax.reduction.plan import TokenPlan


class KeepSchedule(NamedTuple):
    """When the keep rate falls from 1 to its base value, in steps."""

    start: int   # first step of the cosine
    length: int  # steps of the cosine; 0: the base rate from `start` on
    levels: int  # programs, the first dense and the last at the base rate


class Stage(NamedTuple):
    """Steps from `start` on that run one program."""

    start: int
    progress: float  # 0: every token stays; 1: the base rate
    plan: TokenPlan


def progress(schedule: KeepSchedule, step: int) -> float:
    """How far the exact cosine has come at a step: the keep rate is `1 - (1 - base) * progress`.

    Source: EViT, section 4 (implementation); adjust_keep_rate in youweiliang/evit, helpers.py.
    """
    done = step - schedule.start
    if done < 0:
        return 0.0
    if done >= schedule.length:
        return 1.0
    return (1 - math.cos(math.pi * done / schedule.length)) / 2


def stages(schedule: KeepSchedule, plan_at: Callable[[float], TokenPlan], total_steps: int) -> tuple[Stage, ...]:
    """The stages of a run, in order; levels with equal plans are one stage.

    Args:
      plan_at: progress in [0, 1] -> plan.
      total_steps: stages that would start at or after it are left out.

    Raises:
      ValueError: fewer than two levels for a rate that changes.
    """
    if schedule.start <= 0 and schedule.length <= 0:
        return (Stage(0, 1.0, plan_at(1.0)),)
    if schedule.levels < 2:
        raise ValueError(f'levels={schedule.levels}: a keep rate that shrinks needs at least 2 levels, '
                         'or start at the base rate with start_epoch=0 and shrink_epochs=0')
    out = []
    for level in range(schedule.levels):
        share = level / (schedule.levels - 1)
        start = _first_step(schedule, share)
        plan = plan_at(share)
        if start >= total_steps:
            break
        if out and out[-1].start == start:
            out.pop()
        if not out or out[-1].plan != plan:
            out.append(Stage(start, share, plan))
    return tuple(out)


def _first_step(schedule, share):
    """The first step at which the exact cosine has come as far as `share`."""
    if share == 0:
        return 0
    low, high = schedule.start, schedule.start + max(schedule.length, 0)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if progress(schedule, middle) >= share else (middle + 1, high)
    return low
