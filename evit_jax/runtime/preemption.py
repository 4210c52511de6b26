"""Ends a run on SIGTERM or SIGINT: finishes the step, saves, and exits with code 75.

Schedulers treat this exit code as "restart".
"""

import os
import signal
import threading
from types import TracebackType

import jax
from absl import logging
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL in sysexits.h: a temporary failure


class Preempted(SystemExit):
    """The run was stopped by a signal. Everything is saved, and the same command continues it."""

    def __init__(self):
        super().__init__(EXIT_CODE)


class PreemptionHandler:
    """Handles SIGTERM (preemption) and SIGINT (Ctrl-C) in the body of a `with`.

    A second Ctrl-C ends the run immediately, without saving. If the run has several processes, a signal to one of them
    is enough: JAX's preemption service handles SIGTERM and selects a step at which all processes stop.
    """

    def __init__(self):
        self._signalled = False
        self._num_checks = 0
        self._handlers_before: dict[int, object] = {}

    def __enter__(self) -> 'PreemptionHandler':
        if threading.current_thread() is threading.main_thread():
            self._handlers_before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_signal)
            if not jax.distributed.is_initialized():
                self._handlers_before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            # Another SIGTERM must not interrupt the shutdown or change the exit code.
            signal.signal(number, signal.SIG_IGN if kind is Preempted and number == signal.SIGTERM else handler)

    def check(self) -> None:
        """Raises `Preempted` if the run must stop. All processes call this at the same points in the same order.

        Raises:
          Preempted: a signal has arrived.
        """
        self._num_checks += 1
        stop = self._signalled
        if jax.distributed.is_initialized():
            stop = multihost_utils.reached_preemption_sync_point(self._num_checks)
        if stop:
            logging.info('stopping on a signal: unsaved progress is saved now')
            raise Preempted

    def _on_signal(self, number, frame):
        if number == signal.SIGINT and self._signalled:
            raise KeyboardInterrupt
        if not self._signalled:
            self._signalled = True
            logging.info('%s: the run saves and ends after this step%s', signal.Signals(number).name,
                         '; once more ends it at once, unsaved' if number == signal.SIGINT else '')
            if jax.distributed.is_initialized():
                os.kill(os.getpid(), signal.SIGTERM)
