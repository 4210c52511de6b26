"""Runs `evit_jax.main` on the tiny model and images of `layouts`: python -m tests.helpers.slow_main FLAGS.

While the file in the environment variable SLOW_MAIN exists, each step after the fifth takes four seconds, so that a
test can disturb the run between two steps.
"""

import os
import time

import pytest

from evit_jax import main
from evit_jax.runtime.preemption import PreemptionHandler
from tests.helpers import layouts

NUM_FAST, SECONDS = 5, 4.0


def slow(check):
    """Returns a `PreemptionHandler.check` that sleeps first."""
    num_checks = 0

    def slow_check(handler):
        nonlocal num_checks
        num_checks += 1
        if num_checks > NUM_FAST and os.path.exists(os.environ['SLOW_MAIN']):
            time.sleep(SECONDS)
        check(handler)
    return slow_check


if __name__ == '__main__':
    patch = pytest.MonkeyPatch()
    layouts.prepare(patch)
    patch.setattr(PreemptionHandler, 'check', slow(PreemptionHandler.check))
    main.run()
