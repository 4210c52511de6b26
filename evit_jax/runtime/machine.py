"""Defaults that depend on the machine: the dtype of the computation and the number of data workers."""

import math
import os
import pathlib

import jax.numpy as jnp
from absl import logging

AUTO = 'auto'    # model.dtype: by platform
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}  # dtypes of the computation, by name
BY_CORES = -1    # data.workers: by the number of usable cores
MAX_WORKERS = 8  # most workers that BY_CORES gives; a config may set more


def resolve_dtype(dtype: str, platform: str, recorded: str | None = None) -> str:
    """Returns the name of the computation's dtype; resolves 'auto'.

    Args:
      dtype: value of model.dtype.
      platform: platform of the computation: 'cpu', 'gpu' or 'tpu'.
      recorded: dtype of the run that is continued or evaluated; it takes precedence over the platform's.
    """
    if dtype != AUTO:
        return dtype
    if recorded not in (None, AUTO):
        return recorded
    return 'float32' if platform == 'cpu' else 'bfloat16'  # XLA emulates bfloat16 on most CPUs, which is slower


def resolve_workers(workers: int, cores: int | None = None) -> int:
    """Returns the number of worker processes; resolves -1. 0 stands for a thread of this process.

    One core is left to the main process, which sends work to the devices or computes itself.

    Args:
      workers: value of data.workers.
      cores: number of cores that this process may use; counted if not given.
    """
    if workers != BY_CORES:
        return workers
    cores = usable_cores() if cores is None else cores
    chosen = 0 if cores <= 2 else min(cores - 1, MAX_WORKERS)
    logging.log_first_n(logging.INFO, 'data.workers=%d: %s, as this process may use %d cores', 1, BY_CORES,
                        f'{chosen} worker processes' if chosen else 'a thread', cores)
    return chosen


def usable_cores(root: str | os.PathLike = '/') -> int:
    """Returns the number of cores that this process may use, by its CPU affinity and its control group's CPU quota.

    Args:
      root: root of the file system that holds /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return int(max(1, min(cores, _quota(pathlib.Path(root)))))


def _quota(root):
    """Returns the number of cores that the control groups (version 1 or 2) allow; infinity without a limit."""
    least = math.inf
    for line in _text(root / 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        mount = root / 'sys/fs/cgroup' / ('cpu' if controllers else '')
        group = mount / path.lstrip('/')
        for folder in (group, *group.parents):
            least = min(least, _quota_of(folder))
            if folder == mount:  # in a container the mount is often the group itself, although the path names another
                break
    return least


def _quota_of(group):
    """Returns the number of cores that one control group allows."""
    limit = _text(group / 'cpu.max').split() or [_text(group / f'cpu.cfs_{name}_us').strip()
                                                 for name in ('quota', 'period')]
    return int(limit[0]) / int(limit[1]) if all(part.isdigit() for part in limit) else math.inf


def _text(file):
    try:
        return file.read_text()
    except OSError:
        return ''
