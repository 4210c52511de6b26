"""The suite runs on CPU, on 8 virtual devices, so that sharding is exercised everywhere; programs are compiled once."""

import gc
import os
import shutil
import signal
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='evit_jax_programs_')  # inherited by processes
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
    shutil.rmtree(os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
