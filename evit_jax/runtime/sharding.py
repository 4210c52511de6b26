"""The device mesh and its shardings: the batch is split along `data`; the state is replicated or sharded (FSDP)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Result = TypeVar('Result')
SHARDINGS = ('replicated', 'fsdp')
_MIN_FSDP_SIZE = 2**14  # elements; FSDP replicates smaller arrays, whose all-gather costs more than the memory saved


def data_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the single axis `data`; the devices of a process are neighbours on it.

    Args:
      batch_size: batch size of all processes.
      devices: devices of the mesh; all devices if not given.

    Raises:
      ValueError: the batch size is not divisible by the number of devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if batch_size % len(devices):
        below = batch_size // len(devices) * len(devices)
        near = ' or '.join(str(size) for size in (below, below + len(devices)) if size)
        raise ValueError(f'batch_size={batch_size} is not divisible by the {len(devices)} devices: use {near}')
    return Mesh(np.asarray(devices), ('data',))


def with_mesh(mesh: Mesh, step: Callable[..., Result]) -> Callable[..., Result]:
    """Wraps a step so that it is traced with the mesh in context; `shard_map` in the step uses that mesh."""

    @functools.wraps(step)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def state_shardings(state: Any, mesh: Mesh, how: str) -> Any:
    """Returns the sharding of each array of a state.

    Args:
      state: tree of arrays or abstract arrays.
      mesh: the device mesh.
      how: 'replicated', or 'fsdp': each array is split along its largest axis that is divisible by the number of
        devices. Small arrays, and arrays without such an axis, are replicated.
    """
    rule = {'replicated': lambda shape: replicated(mesh), 'fsdp': lambda shape: _fsdp_sharding(shape, mesh)}[how]
    return jax.tree.map(lambda leaf: rule(leaf.shape), state)


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """Transfers this process's part of a batch to its devices; returns global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(outputs: Any) -> Any:
    """Returns the rows of global output arrays that belong to this process's part of the batch, as numpy arrays."""
    def rows(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, outputs)


def _fsdp_sharding(shape, mesh):
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes or math.prod(shape) < _MIN_FSDP_SIZE:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), 'data'))
