"""The compiled programs of a run: one for each stage of the keep-rate schedule, the later ones made while one runs."""

import bisect
import concurrent.futures
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from absl import logging


class ScheduleStage(Protocol):
    """A part of a run: from step `start` on, the program of `plan` runs."""

    start: int
    plan: Any


class Programs:
    """Compiles ahead, in a background thread, one after the other.

    All that are to come, since a stage may be shorter than the next one's program takes to compile.

    Args:
      stages: of the schedule, in order.
      compile_plan: plan -> compiled step.
    """

    def __init__(self, stages: Sequence[ScheduleStage], compile_plan: Callable[[Any], Callable]):
        self.stages = stages
        self._compile_plan = compile_plan
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._futures: dict[int, concurrent.futures.Future] = {}
        logging.info('%d program%s to compile: %s', len(stages), 's' if len(stages) > 1 else '',
                     '; '.join(f'from step {stage.start}: {stage.plan}' for stage in stages))

    def at(self, step: int) -> tuple[ScheduleStage, Callable]:
        """The stage of a step and its program; waits where that is not ready."""
        number = bisect.bisect_right([stage.start for stage in self.stages], step) - 1
        program = self._ask(number).result()
        for later in range(number + 1, len(self.stages)):
            self._ask(later)
        return self.stages[number], program

    def close(self) -> None:
        """Drops what has not begun to compile."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, number):
        if number not in self._futures:
            self._futures[number] = self._pool.submit(self._compile, number)
        return self._futures[number]

    def _compile(self, number):
        begin = time.perf_counter()
        program = self._compile_plan(self.stages[number].plan)
        logging.info('program %d of %d compiled in %.1f s (%s), needed from step %d', number + 1, len(self.stages),
                     time.perf_counter() - begin, self.stages[number].plan, self.stages[number].start)
        return program
