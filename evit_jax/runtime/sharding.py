"""The device mesh and the shardings on it: the batch is split along `data`; the state is whole or sharded (FSDP)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Result = TypeVar('Result')
SHARDINGS = ('replicated', 'fsdp')
_SMALL = 2**14  # elements; FSDP keeps smaller arrays whole, since collecting them costs more time than it saves memory


def data_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the one axis `data`, on which the devices of a process are neighbours.

    Args:
      devices: all there are, if not given.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    if batch_size % len(devices):
        below = batch_size // len(devices) * len(devices)
        near = ' or '.join(str(size) for size in (below, below + len(devices)) if size)
        raise ValueError(f'batch_size={batch_size} is not divisible by the {len(devices)} devices: use {near}')
    return Mesh(np.asarray(devices), ('data',))


def with_mesh(mesh: Mesh, step: Callable[..., Result]) -> Callable[..., Result]:
    """The step, traced so that what it calls can divide by hand what XLA does not divide over the mesh."""

    @functools.wraps(step)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def state_shardings(state: Any, mesh: Mesh, how: str) -> Any:
    """Where each array of a state lies.

    Args:
      state: a tree of anything with shapes.
      how: 'replicated', or 'fsdp': each array divided among the devices along the largest axis that they divide;
        small ones, and those without such an axis, whole on every device.
    """
    place = {'replicated': lambda shape: replicated(mesh), 'fsdp': lambda shape: _divided(shape, mesh)}[how]
    return jax.tree.map(lambda leaf: place(leaf.shape), state)


def _divided(shape, mesh):
    axes = [axis for axis, size in enumerate(shape) if size % mesh.size == 0]
    if not axes or math.prod(shape) < _SMALL:
        return replicated(mesh)
    return NamedSharding(mesh, PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), 'data'))


def shard_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's share of a batch, put on the devices as one global batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def local_rows(outputs: Any) -> Any:
    """The rows of a batch's outputs that belong to this process's share of it, as numpy arrays."""
    def rows(leaf):
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start)
        return np.concatenate([np.asarray(shard.data) for shard in shards])

    return jax.tree.map(rows, outputs)
