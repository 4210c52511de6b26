"""One mesh over all devices: the batch is split along `data`, the state is on every device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def data_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices with the one axis `data`.

    Raises:
      ValueError: the batch cannot be split evenly over the devices.
    """
    devices = jax.devices()
    if batch_size % len(devices):
        below = batch_size // len(devices) * len(devices)
        near = ' or '.join(str(size) for size in (below, below + len(devices)) if size)
        raise ValueError(f'batch_size={batch_size} is not divisible by the {len(devices)} devices: use {near}')
    return Mesh(np.asarray(devices), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def place_batch(batch: dict, mesh: Mesh) -> dict:
    """This process's share of a batch, put on the devices as one global batch."""
    sharding = split_batch(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}
