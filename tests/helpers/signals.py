"""Sends this process a signal at a chosen point of a run."""

import os
import signal

from evit_jax.runtime import preemption


def signal_at_check(monkeypatch, check_number, number=signal.SIGTERM, times=1):
    """Sends this process the signal before the run's `check_number`-th call of `PreemptionHandler.check`."""
    check, num_checks = preemption.PreemptionHandler.check, [0]

    def signalling_check(self):
        num_checks[0] += 1
        if num_checks[0] == check_number:
            for _ in range(times):
                os.kill(os.getpid(), number)
        check(self)

    monkeypatch.setattr(preemption.PreemptionHandler, 'check', signalling_check)
