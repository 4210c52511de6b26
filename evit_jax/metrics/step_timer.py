"""Measures the speed of a training loop, and warns about unusually slow steps."""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from absl import logging
from tqdm import tqdm

from evit_jax.metrics.writers import MetricWriter

PHASES = {'input': 'waiting for the input', 'compile': 'waiting for a program to be compiled', 'save': 'saving',
          'devices': 'waiting for the devices'}
_MEDIAN_STEPS = 101  # number of recent steps; the median of their durations is the usual duration
_MIN_STEPS = 5       # number of timed steps required before a step can count as slow
_SLOW_FACTOR = 10.0  # a step is slow if it takes this many times the usual duration
_MIN_SLOW = 20.0     # minimal duration of a slow step, in seconds


class StepTimer:
    """Times the steps of a training loop, between `restart` and `close`.

    A background thread logs a warning when a step is slow, and again each time its duration has doubled.

    Args:
      total_steps: number of steps in the run.
      batch_size: global batch size, over all processes.
      min_slow: minimal duration of a slow step, in seconds.
      clock: returns the time in seconds.
      watch: start the background thread.
    """

    def __init__(self, total_steps: int, batch_size: int, *, min_slow: float = _MIN_SLOW,
                 clock: Callable[[], float] = time.perf_counter, watch: bool = True):
        self._total_steps, self._batch_size, self._min_slow, self._clock = total_steps, batch_size, min_slow, clock
        self._durations: collections.deque = collections.deque(maxlen=_MEDIAN_STEPS)
        self._current: tuple[int, float] | None = None  # number and start time of the current step
        self._phase = ''
        self._warned: tuple[int | None, float] = (None, 0.0)  # step number and duration at the last warning
        self.restart(0)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch_steps, name='slow steps', daemon=True)
        if watch:
            self._thread.start()

    def close(self) -> None:
        """Ends the background thread."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self, number: int) -> None:
        """Ends the current step and begins step `number`."""
        now = self._clock()
        if self._current is not None:
            last, begin = self._current
            if now - begin > self._slow_limit():
                logging.warning('step %d took %.1f s, usually %.3g s', last, now - begin, self._usual_duration())
            self._durations.append(now - begin)
        self._current = number, now

    def restart(self, done: int) -> None:
        """Begins a new log line after `done` steps. The time since the last line (an evaluation) is not counted."""
        self._current = None
        self._begin_line(done)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of the body to one of `PHASES`."""
        outer, self._phase = self._phase, name
        begin = self._clock()
        try:
            yield
        finally:
            self._durations_of_phases[name] += self._clock() - begin
            self._phase = outer

    def write(self, done: int, epoch: float, metrics: dict[str, float], keep_rate: float, writer: MetricWriter) -> None:
        """Logs a line and writes scalars for the steps since the last line.

        Args:
          done: number of completed steps.
          epoch: number of completed epochs.
          metrics: metrics of the last step; the log line shows `loss` and `lr`.
          keep_rate: keep rate of the last step.
          writer: receives all metrics and speeds as `train/NAME`.
        """
        steps = done - self._line_start
        seconds = max((self._clock() - self._line_begin) / steps, 1e-9)  # seconds per step
        shares = {name: spent / seconds / steps for name, spent in self._durations_of_phases.items()}
        logging.info('step %d/%d  epoch %.2f  loss %.4f  lr %.2e  keep %.2f  %.0f images/s  %.0f ms/step  '
                     'input wait %.1f %%  compile wait %.1f %%  ETA %s', done, self._total_steps, epoch,
                     metrics['loss'], metrics['lr'], keep_rate, self._batch_size / seconds, 1e3 * seconds,
                     100 * shares['input'], 100 * shares['compile'],
                     tqdm.format_interval(seconds * (self._total_steps - done)))
        writer.write_scalars(done, {f'train/{name}': value for name, value in metrics.items()} | {
            'train/keep_rate': keep_rate, 'train/images_per_second': self._batch_size / seconds,
            'train/step_seconds': seconds, 'train/input_wait': shares['input'],
            'train/compile_wait': shares['compile'], 'train/save_wait': shares['save']})
        self._begin_line(done)

    def check_current_step(self) -> None:
        """Logs a warning if the current step is slow and its duration has doubled since the last warning."""
        if (step := self._current) is None:
            return
        duration = self._clock() - step[1]
        last_warning = self._warned[1] if self._warned[0] == step[0] else 0
        if duration > max(self._slow_limit(), 2 * last_warning):
            logging.warning('step %d has taken %.0f s so far, usually %.3g s: %s', step[0], duration,
                            self._usual_duration(), PHASES.get(self._phase, 'in between'))
            self._warned = step[0], duration

    def _begin_line(self, done):
        self._line_begin, self._line_start = self._clock(), done
        self._durations_of_phases = dict.fromkeys(PHASES, 0.0)

    def _usual_duration(self):
        return statistics.median(self._durations)

    def _slow_limit(self):
        if len(self._durations) < _MIN_STEPS:
            return float('inf')
        return max(_SLOW_FACTOR * self._usual_duration(), self._min_slow)

    def _watch_steps(self):
        while not self._closed.wait(self._min_slow / 4):
            self.check_current_step()
