"""Device mesh and shardings. The batch is split along the axis `data`; the state is replicated or sharded (FSDP)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Result = TypeVar('Result')
SHARDINGS = ('replicated', 'fsdp')
_MIN_FSDP_SIZE = 2**14  # number of elements; FSDP replicates smaller arrays, because their all-gather costs too much


def data_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with the single axis `data`. The devices of a process are adjacent.

    Args:
      batch_size: global batch size, over all processes.
      devices: devices of the mesh; default: all devices.

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
    """Wraps a step so that it is traced in the context of the mesh, which `shard_map` in the step then uses."""

    @functools.wraps(step)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def state_shardings(state: Any, mesh: Mesh, how: str) -> Any:
    """Returns the sharding of each array of a state.

    Args:
      state: tree of arrays or abstract arrays.
      mesh: the device mesh.
      how: 'replicated' or 'fsdp'. FSDP splits each array along its largest axis that is divisible by the number of
        devices. It replicates small arrays and arrays without such an axis.
    """
    rule = {'replicated': lambda shape: replicated(mesh), 'fsdp': lambda shape: _fsdp_sharding(shape, mesh)}[how]
    return jax.tree.map(lambda leaf: rule(leaf.shape), state)


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """Transfers the batch rows of this process to its devices. Returns global arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(outputs: Any) -> Any:
    """Returns the rows of global output arrays that belong to this process, as numpy arrays."""
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
