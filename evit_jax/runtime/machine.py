"""Defaults that depend on the machine: compute dtype and number of data workers."""

import math
import os
import pathlib

import jax.numpy as jnp
from absl import logging

AUTO = 'auto'    # value of model.dtype that selects the dtype by platform
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}  # compute dtypes by name
BY_CORES = -1    # value of data.workers that selects the number of workers by the number of usable cores
MAX_WORKERS = 8  # maximal number of workers for BY_CORES


def resolve_dtype(dtype: str, platform: str, recorded: str | None = None) -> str:
    """Returns the name of the compute dtype; resolves 'auto'.

    Args:
      dtype: value of model.dtype.
      platform: platform of the computation: 'cpu', 'gpu' or 'tpu'.
      recorded: dtype of the run that is continued or evaluated; replaces the default of the platform.
    """
    if dtype != AUTO:
        return dtype
    if recorded not in (None, AUTO):
        return recorded
    return 'float32' if platform == 'cpu' else 'bfloat16'  # XLA emulates bfloat16 on most CPUs, which is slower


def resolve_workers(workers: int, cores: int | None = None) -> int:
    """Returns the number of worker processes; resolves -1. 0 means a thread of this process.

    One core is reserved for the main process.

    Args:
      workers: value of data.workers.
      cores: number of cores that this process may use; default: `usable_cores()`.
    """
    if workers != BY_CORES:
        return workers
    cores = usable_cores() if cores is None else cores
    num_workers = 0 if cores <= 2 else min(cores - 1, MAX_WORKERS)
    logging.log_first_n(logging.INFO, 'data.workers=%d: %s, as this process may use %d cores', 1, BY_CORES,
                        f'{num_workers} worker processes' if num_workers else 'a thread', cores)
    return num_workers


def usable_cores(root: str | os.PathLike = '/') -> int:
    """Returns the number of cores that this process may use: the minimum of CPU affinity and control group quota.

    Args:
      root: root of the file system that contains /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return int(max(1, min(cores, _quota(pathlib.Path(root)))))


def _quota(root):
    """Returns the number of cores that the control groups (version 1 or 2) allow; infinity if there is no limit."""
    least = math.inf
    for line in _text(root / 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        mount = root / 'sys/fs/cgroup' / ('cpu' if controllers else '')
        group = mount / path.lstrip('/')
        for folder in (group, *group.parents):
            least = min(least, _quota_of(folder))
            if folder == mount:  # in a container, the mount may be the group itself
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
