"""Runs the suite on CPU with 8 virtual devices, so that every test exercises sharding.

Most of the time goes to tracing and compilation. Programs are compiled without optimisation, and kept in a persistent
cache for later runs. Tests share traces, programs and jitted training steps.
"""

import gc
import os
import pathlib
import resource
import shutil
import signal

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join((os.environ.get('XLA_FLAGS', ''), '--xla_force_host_platform_device_count=8',
                                    '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false',
                                    '--xla_cpu_parallel_codegen_split_count=1'))
# The workers of pytest-xdist and the processes that tests start inherit the cache. `pytest --cache-clear` removes it.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.environ.get('JAX_COMPILATION_CACHE_DIR') or str(
    pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'd' / 'programs')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'

import jax
import orbax.checkpoint as ocp
import pytest
from absl import logging

from tests.helpers import step_sharing

# Orbax would divide each array among the 8 devices, one slice at a time, which takes most of the time of a save.
ocp.type_handlers.get_type_handler(jax.Array)._use_replica_parallel = False
# Most objects live until the end of the process: the default thresholds collect too often.
gc.set_threshold(50_000, 20, 50)
MAX_CACHE = 2**29  # bytes; a larger cache is deleted before a run
MAX_GROWTH = 1.5 * 2**20  # KB that a process may gain before its programs are freed
MAX_MAPPINGS = 30_000  # memory mappings before programs are freed; Linux allows 65,530, and each program has some


@pytest.fixture(autouse=True, scope='session')
def shared_steps():
    with step_sharing.shared():
        yield


@pytest.fixture(autouse=True, scope='session')
def memory():
    """Peak memory at which the programs of this process were freed for the last time."""
    return {'freed_at': _peak_memory()}


@pytest.fixture(autouse=True, scope='module')
def free_programs(memory):
    """Frees traces and programs after a test file if they take much memory. Until then, other files use them."""
    yield
    if _peak_memory() > memory['freed_at'] + MAX_GROWTH or _num_mappings() > MAX_MAPPINGS:
        jax.clear_caches()
        gc.unfreeze()
        gc.collect()
        memory['freed_at'] = _peak_memory()


@pytest.fixture(autouse=True)
def short_collections():
    """Keeps garbage collections short: they skip all objects made before the test. Training collects often."""
    gc.freeze()


@pytest.fixture(autouse=True)
def restore_verbosity():
    """Restores the least level of the log, which some programs raise."""
    logger = logging.get_absl_logger()
    before = logger.level
    yield
    logger.setLevel(before)


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


def pytest_configure(config):
    cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
    if not hasattr(config, 'workerinput') and sum(file.stat().st_size for file in cache.glob('*')) > MAX_CACHE:
        shutil.rmtree(cache)


def _num_mappings():
    maps = pathlib.Path('/proc/self/maps')
    return len(maps.read_bytes().splitlines()) if maps.exists() else 0


def _peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
