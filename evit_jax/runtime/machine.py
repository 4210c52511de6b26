"""Defaults that follow the machine: the dtype of the computation and the number of data workers."""

import math
import os
import pathlib

from absl import logging

AUTO = 'auto'        # model.dtype: by platform
BY_CORES = -1        # data.workers: by the number of usable cores
MAX_WORKERS = 8      # chosen automatically; a config may set more


def resolve_dtype(dtype: str, platform: str, recorded: str | None = None) -> str:
    """The dtype of the computation, with 'auto' resolved.

    Args:
      dtype: from the config.
      platform: 'cpu', 'gpu' or 'tpu', where the computation runs.
      recorded: dtype of the run that continues or is evaluated; it wins over the platform.
    """
    if dtype != AUTO:
        return dtype
    if recorded not in (None, AUTO):
        return recorded
    return 'float32' if platform == 'cpu' else 'bfloat16'  # XLA emulates bfloat16 on most CPUs, which is slower


def resolve_workers(workers: int, cores: int | None = None) -> int:
    """The number of worker processes, with -1 resolved; 0 is a thread of this process.

    One core is left to the main process, which sends work to the devices, or computes.

    Args:
      workers: from the config.
      cores: that this process may use; counted if not given.
    """
    if workers != BY_CORES:
        return workers
    cores = usable_cores() if cores is None else cores
    chosen = 0 if cores <= 2 else min(cores - 1, MAX_WORKERS)
    logging.log_first_n(logging.INFO, 'data.workers=%d: %s, as this process may use %d cores', 1, BY_CORES,
                        f'{chosen} worker processes' if chosen else 'a thread', cores)
    return chosen


def usable_cores(root: str | os.PathLike = '/') -> int:
    """Number of cores that this process may use, by its CPU affinity and the CPU quota of its control group.

    Args:
      root: root of the file system with /proc and /sys.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    return int(max(1, min(cores, _quota(pathlib.Path(root)))))


def _quota(root):
    """Cores that the control groups of this process allow, version 2 or 1; infinity without a limit."""
    least = math.inf
    for line in _text(root / 'proc/self/cgroup').splitlines():
        _, controllers, path = line.split(':', 2)
        if controllers and 'cpu' not in controllers.split(','):
            continue
        mount = root / 'sys/fs/cgroup' / ('cpu' if controllers else '')
        group = mount / path.lstrip('/')
        for folder in (group, *group.parents):
            least = min(least, _quota_of(folder))
            if folder == mount:  # a container often sees its own group here, though the path names another
                break
    return least


def _quota_of(group):
    """Cores that one control group allows."""
    limit = _text(group / 'cpu.max').split() or [_text(group / f'cpu.cfs_{name}_us').strip()
                                                 for name in ('quota', 'period')]
    return int(limit[0]) / int(limit[1]) if all(part.isdigit() for part in limit) else math.inf


def _text(file):
    try:
        return file.read_text()
    except OSError:
        return ''
