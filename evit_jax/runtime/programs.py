"""Compiles the training step for each stage of the keep-rate schedule, ahead of time."""

import bisect
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from absl import logging


class ScheduleStage(Protocol):
    """A range of steps that begins at step `start` and uses the token plan `plan`."""

    start: int
    plan: Any


class Programs:
    """Compiles the programs of later stages in a background thread, while the current program runs.

    The thread compiles all later programs without pausing, because a stage may be shorter than the next compilation.

    Args:
      stages: stages of the schedule, in order.
      compile_plan: compiles the step for a plan.
    """

    def __init__(self, stages: Sequence[ScheduleStage], compile_plan: Callable[[Any], Callable]):
        self.stages = stages
        self._compile_plan = compile_plan
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._futures: dict[int, concurrent.futures.Future] = {}
        logging.info('%d program%s to compile: %s', len(stages), 's' if len(stages) > 1 else '',
                     '; '.join(f'from step {stage.start}: {stage.plan}' for stage in stages))

    def at(self, step: int) -> tuple[ScheduleStage, Callable]:
        """Returns the stage of a step and the program of this stage. Waits until the program is compiled."""
        index = bisect.bisect_right([stage.start for stage in self.stages], step) - 1
        program = self._submit(index).result()
        for later in range(index + 1, len(self.stages)):
            self._submit(later)
        return self.stages[index], program

    def close(self) -> None:
        """Cancels compilations that have not begun, and waits for the current compilation."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, index):
        if index not in self._futures:
            self._futures[index] = self._pool.submit(self._compile, index)
        return self._futures[index]

    def _compile(self, index):
        begin = time.perf_counter()
        program = self._compile_plan(self.stages[index].plan)
        logging.info('program %d of %d compiled in %.1f s (%s), needed from step %d', index + 1, len(self.stages),
                     time.perf_counter() - begin, self.stages[index].plan, self.stages[index].start)
        return program
