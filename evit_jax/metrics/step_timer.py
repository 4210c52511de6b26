"""How fast a run goes: rates of the steps since the last line, and a line while one takes far longer than usual."""

import collections
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator

from absl import logging
from tqdm import tqdm

from evit_jax.metrics.writers import MetricWriter

PHASES = {'input': 'waiting for the input', 'compile': 'waiting for a program to be compiled', 'save': 'saving',
          'devices': 'waiting for the devices'}
_REMEMBERED = 101   # steps whose median is what is usual
_FEWEST = 5         # steps, before which nothing is unusual
_TIMES = 10.0       # the usual, from which on a step is slow
_LEAST = 20.0       # seconds, before which none is


class StepTimer:
    """Measures the training loop, from its first `restart`. Call `close()` at the end.

    Args:
      total_steps: of the run.
      batch_size: of all processes.
      least: seconds before which no step is called slow.
    """

    def __init__(self, total_steps: int, batch_size: int, *, least: float = _LEAST):
        self._total_steps, self._batch_size, self._least = total_steps, batch_size, least
        self._durations: collections.deque = collections.deque(maxlen=_REMEMBERED)
        self._step: tuple[int, float] | None = None  # under way, since
        self._phase = ''
        self.restart(0)
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._look, name='slow steps', daemon=True)
        self._watch.start()

    def close(self) -> None:
        """Ends the watch for slow steps."""
        self._closed.set()
        self._watch.join()

    def step(self, number: int) -> None:
        """A step begins; the one before has ended."""
        now = time.perf_counter()
        if self._step is not None:
            before, since = self._step
            if now - since > self._limit():
                logging.warning('step %d took %.1f s, usual are %.3g s', before, now - since, self._usual())
            self._durations.append(now - since)
        self._step = number, now

    def restart(self, done: int) -> None:
        """What was since the last line is no part of the next, as an evaluation; it is about the steps from here."""
        self._step = None
        self._begin_line(done)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What the loop does in the body, one of `PHASES`."""
        before, self._phase = self._phase, name
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._spent[name] += time.perf_counter() - begin
            self._phase = before

    def write(self, done: int, epoch: float, metrics: dict[str, float], keep_rate: float, writer: MetricWriter) -> None:
        """The line, and the scalars, of the steps since the last ones."""
        seconds = max((time.perf_counter() - self._begin) / (done - self._from), 1e-9)
        waits = {name: spent / seconds / (done - self._from) for name, spent in self._spent.items()}
        logging.info('step %d/%d  epoch %.2f  loss %.4f  lr %.2e  keep %.2f  %.0f images/s  %.0f ms/step  '
                     'input wait %.1f %%  compile wait %.1f %%  ETA %s', done, self._total_steps, epoch,
                     metrics['loss'], metrics['lr'], keep_rate, self._batch_size / seconds, 1e3 * seconds,
                     100 * waits['input'], 100 * waits['compile'],
                     tqdm.format_interval(seconds * (self._total_steps - done)))
        writer.write_scalars(done, {f'train/{name}': value for name, value in metrics.items()} | {
            'train/keep_rate': keep_rate, 'train/images_per_second': self._batch_size / seconds,
            'train/step_seconds': seconds, 'train/input_wait': waits['input'], 'train/compile_wait': waits['compile'],
            'train/save_wait': waits['save']})
        self._begin_line(done)

    def _begin_line(self, done):
        self._begin, self._from, self._spent = time.perf_counter(), done, dict.fromkeys(PHASES, 0.0)

    def _usual(self):
        return statistics.median(self._durations)

    def _limit(self):
        return max(_TIMES * self._usual(), self._least) if len(self._durations) >= _FEWEST else float('inf')

    def _look(self):
        said = None, 0.0  # the step that was called slow, and after how long
        while not self._closed.wait(self._least / 4):
            if (step := self._step) is None:
                continue
            passed = time.perf_counter() - step[1]
            if passed > max(self._limit(), 2 * said[1] if said[0] == step[0] else 0):
                logging.warning('step %d takes %.0f s so far, usual are %.3g s: %s', step[0], passed, self._usual(),
                                PHASES.get(self._phase, 'in between'))
                said = step[0], passed
