"""Describes config, code, data and weights of a run by short strings, to compare its processes or its starts."""

import functools
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from evit_jax.data import fingerprint
from evit_jax.data.sources import Source
from evit_jax.runtime import agreement, distributed, storage

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'Pillow')
_JAX_SETTINGS = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_threefry_partitionable',
                 'jax_default_prng_impl', 'jax_numpy_dtype_promotion')
# Keys whose values may differ between machines.
_MACHINE_KEYS = ('data.path', 'data.index_cache', 'data.workers', 'compilation_cache', 'log.writer')
# Keys whose values are paths. The contents are compared instead of the paths.
_PATH_KEYS = ('init_from', 'teacher.path', 'data.token_labels')


def check_processes(config: Mapping[str, Any], workdir: str | os.PathLike, **options: Any) -> None:
    """Checks that all processes have the same flat config, workdir, options, versions and number of devices.

    Raises:
      ValueError: some of these differ. Every process raises it.
    """
    if distributed.is_single_process():
        return
    values = {f'config.{key}': bool(value) if key in _PATH_KEYS else value for key, value in config.items()
              if key not in _MACHINE_KEYS}
    devices = f'{jax.local_device_count()} {jax.local_devices()[0].platform}'
    values = {'workdir': storage.as_path(workdir), 'devices': devices} | options | versions() | values
    agreement.check_same(values, 'start all processes with the same command and the same installation')


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of Python and the numerical packages, and a digest of the code of evit_jax."""
    result = {'Python': '.'.join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        result[name] = importlib.metadata.version(name)
    folder = pathlib.Path(__file__).parents[1]
    files = sorted(folder.rglob('*.py'), key=lambda file: file.relative_to(folder).as_posix())
    code = fingerprint.digest(*(part for file in files for part in
                                (file.relative_to(folder).as_posix(), file.read_bytes())))
    settings = ' '.join(f'{name}={getattr(jax.config, name)}' for name in _JAX_SETTINGS)
    return result | {'code of evit_jax': code, 'settings of JAX': settings}


def of_sources(sources: Mapping[str, Source]) -> dict[str, Any]:
    """Returns named values that identify sources, for `agreement.check_same`.

    Args:
      sources: sources by name of the split.
    """
    values = {}
    for split, source in sources.items():
        values |= {f'class {label}': name for label, name in enumerate(source.class_names)}
        metadata = fingerprint.describe(source)
        values |= {'number of classes': source.num_classes, f'data of the split {split!r}': metadata['split'],
                   f'number of examples in {split!r}': metadata['examples'],
                   f'names or order of the examples in {split!r}': metadata['fingerprint']}
    return values
