"""A tiny model for benchmarks, and short measurements of it."""

import pytest

from evit_jax import models
from evit_jax.benchmarks import cases, model_speed, timing
from evit_jax.benchmarks.workloads import WorkloadLists, combine
from evit_jax.models.config import ViTConfig

TINY_LISTS = {'names': ['tiny'], 'rates': [1.0, 0.5], 'fuse': [True], 'image_sizes': [], 'batch_sizes': [2],
              'dtypes': ['float32']}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Registers the model 'tiny' and shrinks the reference matmul, for a test file that imports this fixture."""
    monkeypatch.setitem(models.CONFIGS, 'tiny', ViTConfig(image_size=32, patch_size=8, width=16, depth=4, heads=2,
                                                        classes=5, init_std=0.2))
    monkeypatch.setattr(cases, '_MATMUL_SIZES', {'cpu': 64})


def combine_lists(**lists):
    return combine(WorkloadLists(**lists))


def tiny_workloads(**changes):
    return combine_lists(**TINY_LISTS | changes)


def measure_briefly(selected, **changes):
    return model_speed.measure(selected, **{'rounds': 3, 'seconds': 0.05} | changes)


def time_once(monkeypatch):
    """Replaces the timing of benchmarks: each is called once, and all have equal times."""
    def interleave(benchmarks, **_):
        for benchmark in benchmarks:
            benchmark.wait(benchmark.call(0))
        return [timing.Times((0.1, 0.1), (0.1, 0.1)) for _ in benchmarks]

    monkeypatch.setattr(timing, 'interleave', interleave)
