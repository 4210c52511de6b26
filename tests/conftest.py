"""The suite runs on CPU, on 8 virtual devices, so that sharding is exercised everywhere.

Most of its time goes to compiling: each program is compiled once, and with little care for its speed.
"""

import gc
import os
import shutil
import signal
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
                                    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'))
# Inherited by the processes that run tests beside each other, and by those that tests start.
os.environ['JAX_COMPILATION_CACHE_DIR'] = (
    os.environ['JAX_COMPILATION_CACHE_DIR'] if 'PYTEST_XDIST_WORKER' in os.environ
    else tempfile.mkdtemp(prefix='evit_jax_programs_'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def programs_of_the_file():
    """What a file had compiled goes with it: with that of all files in memory, each collection takes a second."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def signals():
    """A run that was told to stop heeds SIGTERM no more, and what the process starts later would inherit that."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_unconfigure():
    if 'PYTEST_XDIST_WORKER' not in os.environ:
        shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
