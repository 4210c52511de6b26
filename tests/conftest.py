"""Runs the suite on CPU with 8 virtual devices, so that every test exercises sharding.

Most of the time goes to compilation: programs are compiled without optimisation, and once, with a persistent cache.
"""

import gc
import os
import shutil
import signal
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
                                    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'))
# The workers of pytest-xdist and the processes that tests start inherit the cache. Set the variable to keep the cache.
os.environ['JAX_COMPILATION_CACHE_DIR'] = (
    os.environ.get('JAX_COMPILATION_CACHE_DIR') or tempfile.mkdtemp(prefix='evit_jax_programs_'))
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import orbax.checkpoint as ocp
import pytest

# Orbax would divide each array among the 8 devices, one slice at a time, which takes most of the time of a save.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False


@pytest.fixture(autouse=True, scope='module')
def clear_programs():
    """Frees the compiled programs of a test file, and keeps garbage collections short.

    A collection visits all objects but the frozen ones. Training collects after each pass over the data.
    """
    gc.freeze()
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def restore_signal_handlers():
    """Restores the signal handlers after a preempted training, which ignores SIGTERM; later processes inherit them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items):
    """Starts with the folder of the longest files, so that no worker is busy with one when the others have ended."""
    items.sort(key=lambda item: 'training' not in item.path.parts)


def pytest_unconfigure():
    cache = os.environ['JAX_COMPILATION_CACHE_DIR']
    if 'PYTEST_XDIST_WORKER' not in os.environ and 'evit_jax_programs_' in cache:
        shutil.rmtree(cache, ignore_errors=True)
