"""A run that is told to stop: it finishes the step, saves, and leaves with a code on which it is started again."""

import os
import signal
import threading
from types import TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Preempted(SystemExit):
    """The run was told to stop; everything is saved, and the same command continues it."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class PreemptionHandler:
    """Listens, for the time of a `with`, to SIGTERM (preemption) and SIGINT (Ctrl-C); a second Ctrl-C ends at once.

    In several processes it is enough that one of them is told: JAX's preemption service, which has taken SIGTERM over,
    finds a point that all of them will pass.
    """

    def __init__(self):
        self._told = False
        self._asked = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> 'PreemptionHandler':
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._hear)
            if not jax.distributed.is_initialized():
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            # What else the process has to do must not be cut short, nor its exit code changed, by one more SIGTERM.
            signal.signal(number, signal.SIG_IGN if kind is Preempted and number == signal.SIGTERM else handler)

    def check(self) -> None:
        """A point at which the run may stop; all processes pass the same ones in the same order.

        Raises:
          Stopped: it is to stop here.
        """
        self._asked += 1
        if (multihost_utils.reached_preemption_sync_point(self._asked) if jax.distributed.is_initialized()
                else self._told):
            logging.info('told to stop here: what is not saved yet is saved now')
            raise Preempted

    def _hear(self, number, frame):
        if number == signal.SIGINT and self._told:
            raise KeyboardInterrupt
        if not self._told:
            self._told = True
            logging.info('%s: the run saves and ends after this step%s', signal.Signals(number).name,
                         '; once more ends it at once, unsaved' if number == signal.SIGINT else '')
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
