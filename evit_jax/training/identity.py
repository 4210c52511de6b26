"""The identity of a run beyond its arrays: config, code, data and weights as short texts.

They are compared between the processes of a run, and between two starts of it.
"""

import functools
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping
from typing import Any

import jax

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import fingerprint
from evit_jax.data.sources import Source
from evit_jax.runtime import agreement, distributed, storage

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'Pillow')
_JAX_SETTINGS = ('jax_enable_x64', 'jax_default_matmul_precision', 'jax_threefry_partitionable',
                 'jax_default_prng_impl', 'jax_numpy_dtype_promotion')
# Keys whose values may differ between machines. The contents of the paths are compared, not the paths.
_OF_A_MACHINE = ('data.path', 'data.index_cache', 'data.workers', 'compilation_cache', 'log.writer')
_PATHS = ('init_from', 'teacher.path', 'data.token_labels')


def check_processes(config: Any, workdir: str | os.PathLike, **options: Any) -> None:
    """Raises a ValueError in all processes if one has another config, workdir, option, version or number of devices."""
    if distributed.is_single_process():
        return
    flat = workdirs.flat(config.to_dict())
    values = {f'config.{key}': bool(value) if key in _PATHS else value for key, value in flat.items()
              if key not in _OF_A_MACHINE}
    devices = f'{jax.local_device_count()} {jax.local_devices()[0].platform}'
    values = {'workdir': storage.as_path(workdir), 'devices': devices} | options | versions() | values
    agreement.check_same(values, 'start all processes with the same command and the same installation')


@functools.cache
def versions() -> dict[str, str]:
    """Versions of everything that computes, with a digest of this package's code."""
    found = {'Python': '.'.join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        found[name] = importlib.metadata.version(name)
    folder = pathlib.Path(__file__).parents[1]
    files = sorted(folder.rglob('*.py'), key=lambda file: file.relative_to(folder).as_posix())
    code = fingerprint.digest(*(part for file in files for part in
                                (file.relative_to(folder).as_posix(), file.read_bytes())))
    settings = ' '.join(f'{name}={getattr(jax.config, name)}' for name in _JAX_SETTINGS)
    return found | {'code of evit_jax': code, 'settings of JAX': settings}


def of_sources(sources: Mapping[str, Source]) -> dict[str, Any]:
    """The identity of the sources of splits, by the names that the config has for these, for `agreement.check_same`."""
    values = {}
    for split, source in sources.items():
        values |= {f'class {label}': name for label, name in enumerate(source.class_names)}
        metadata = fingerprint.describe(source)
        values |= {'number of classes': source.num_classes, f'data that {split!r} stands for': metadata['split'],
                   f'number of examples in {split!r}': metadata['examples'],
                   f'names or order of the examples in {split!r}': metadata['fingerprint']}
    return values
