"""Resolves the automatic values that depend on the machine: compute dtype and number of data workers."""

import math
import os
import pathlib

from absl import logging

AUTO = 'auto'        # model.dtype: chosen by platform
BY_CORES = -1        # data.workers: chosen by the number of usable cores
MAX_WORKERS = 8      # limit of the automatic choice; a config may set more


def resolve_dtype(dtype: str, platform: str, recorded: str | None = None) -> str:
    """Returns the compute dtype, with 'auto' resolved.

    Args:
      dtype: dtype in the config.
      platform: 'cpu', 'gpu' or 'tpu', where the model computes.
      recorded: dtype of the run that continues or is evaluated; it takes precedence over the platform.
    """
    if dtype != AUTO:
        return dtype
    if recorded not in (None, AUTO):
        return recorded
    return 'float32' if platform == 'cpu' else 'bfloat16'  # XLA emulates bfloat16 on most CPUs, which is slower


def resolve_workers(workers: int, cores: int | None = None) -> int:
    """Returns the number of worker processes, with -1 resolved; 0 means a thread of this process.

    One core is left to the main process.

    Args:
      workers: number in the config.
      cores: number of cores that this process may use; counted if not given.
    """
    if workers != BY_CORES:
        return workers
    cores = usable_cores() if cores is None else cores
    resolved = 0 if cores <= 2 else min(cores - 1, MAX_WORKERS)
    logging.log_first_n(logging.INFO, 'data.workers=%d: %s, as this process may use %d cores', 1, BY_CORES,
                        f'{resolved} worker processes' if resolved else 'a thread', cores)
    return resolved


def usable_cores(root: str | os.PathLike = '/') -> int:
    """Returns the number of cores this process may use, by its CPU affinity and the CPU quota of its control group.

    Args:
      root: root of the file system that holds /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return int(max(1, min(cores, _cpu_quota(pathlib.Path(root)))))


def _cpu_quota(root):
    """Returns the cores that the control groups (version 2 or 1) allow; infinity without a limit."""
    minimum = math.inf
    for line in _read(root / 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        mount = root / 'sys/fs/cgroup' / ('cpu' if controllers else '')
        group = mount / path.lstrip('/')
        for folder in (group, *group.parents):
            minimum = min(minimum, _group_quota(folder))
            if folder == mount:  # a container often finds its own group at the mount, though the path names another
                break
    return minimum


def _group_quota(group):
    """Returns the cores that one control group allows."""
    limit = _read(group / 'cpu.max').split() or [_read(group / f'cpu.cfs_{name}_us').strip()
                                                 for name in ('quota', 'period')]
    return int(limit[0]) / int(limit[1]) if all(part.isdigit() for part in limit) else math.inf


def _read(file):
    try:
        return file.read_text()
    except OSError:
        return ''
