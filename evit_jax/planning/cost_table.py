"""A table of the costs of a model's parts by token count, and the JSON file of the table.

Costs are measured or estimated once; see `cost_measurement`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from evit_jax import models
from evit_jax.benchmarks import cases, report, tpu
from evit_jax.benchmarks.benchmark_model import BenchmarkModel
from evit_jax.models.config import ImageSize, ViTConfig
from evit_jax.planning.search import BlockCosts, Costs, interpolate

THIS_DEVICE = 'this'
# Name -> TPU chip to estimate costs for; None for this device, on which costs are measured.
DEVICES = {THIS_DEVICE: None} | {f'tpu_{kind}': chip for kind, chip in tpu.CHIPS.items()}
_CACHE = '~/.cache/evit_jax/costs'


class CostRequest(NamedTuple):
    """The model, batch size, dtype and device for which costs are requested."""

    model: str
    image_size: ImageSize
    batch: int
    dtype: str
    device: str  # a key of DEVICES
    fuse: bool = True
    run: BenchmarkModel | None = None  # the run that the model belongs to; None for a named model
    reducers: tuple[str, ...] = ('evit',)  # names of the reducers whose reductions are measured

    @property
    def config(self) -> ViTConfig:
        return dataclasses.replace(self.run.config if self.run else models.get_config(self.model),
                                   image_size=self.image_size)

    def metadata(self) -> dict[str, Any]:
        """Returns the fields for JSON. The run is omitted, because costs do not depend on the weights."""
        return {name: value for name, value in self._asdict().items() if name != 'run'}

    @property
    def patches(self) -> int:
        return self.config.patches(self.image_size)

    @property
    def max_tokens(self) -> int:
        """Number of patches plus prefix tokens."""
        return self.patches + self.config.num_prefix_tokens

    def key(self) -> dict[str, Any]:
        """Returns all values that determine the costs. Initialises JAX's backend if costs are for this device."""
        key = self.metadata() | {'depth': self.config.depth, 'config': repr(self.config), 'jax': jax.__version__,
                                 'parts': COUNTED_PARTS, 'sources': source_digest()}
        if self.device != THIS_DEVICE:
            return key | {'libtpu': tpu.version()}
        device = cases.device()
        key |= {'kind': device.device_kind, 'processor': report.processor()}
        return key | ({'threads': report.num_cpus()} if device.platform == 'cpu' else {})


class CostTable(NamedTuple):
    """Seconds per batch of each part, keyed by token count including prefix tokens."""

    key: dict[str, Any]          # key of the request
    outside: float               # embedding, final norm and heads, with the heads applied to all tokens
    dense: float | None          # the whole dense model; None if it was not timed
    attention: dict[int, float]
    mlp: dict[int, float]
    reduction: dict[str, dict[int, float]]  # name of the reducer -> costs
    last_block: dict[int, float]  # empty if the heads read the patch tokens
    heads: dict[int, float]       # empty if the heads read only the prefix tokens

    def costs(self, max_tokens: int, prefix: int, reducer: str = 'evit') -> Costs:
        """Returns the costs for every number of tokens. They are scaled to match the measured time of the dense model.

        A part that runs alone finds caches and memory in another state than within a whole model. The scale corrects
        for this difference.
        """
        def interpolated(part):
            return interpolate(nondecreasing(part) if self.dense else part, max_tokens)

        block = BlockCosts(interpolated(self.attention), interpolated(self.mlp), interpolated(self.reduction[reducer]))
        zeros = np.zeros(max_tokens + 1)
        if self.last_block:  # only the prefix tokens leave the last block, so reducing tokens in it saves nothing
            last, heads = BlockCosts(interpolated(self.last_block), zeros, zeros), zeros
        else:
            last, heads = block, interpolated(self.heads)
        scale = 1.0
        if self.dense and self.dense > self.outside:
            blocks = (self.key['depth'] - 1) * block.total[max_tokens] + last.total[max_tokens]
            scale = (self.dense - self.outside) / blocks
        block, last = (BlockCosts(*(part * scale for part in costs)) for costs in (block, last))
        return Costs(self.outside - heads[max_tokens], block, last._replace(leaving=last.leaving + heads), prefix)


COUNTED_PARTS = CostTable._fields[3:]  # parts whose cost depends on the number of tokens


@functools.cache
def source_digest() -> str:
    """Returns a digest of the code that determines measured and estimated costs."""
    root = pathlib.Path(models.__file__).parents[1]
    files = [*(file for folder in ('models', 'kernels', 'reduction') for file in sorted((root / folder).rglob('*.py'))),
             *(root / f'{name}.py' for name in ('planning/model_parts', 'benchmarks/tpu', 'benchmarks/hlo'))]
    return hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:16]


def nondecreasing(costs: Mapping[int, float]) -> dict[int, float]:
    """Returns the least-squares fit that does not decrease with the token count, by pooling adjacent violators.

    More tokens are never faster, so a decrease is noise.
    """
    pools = []  # [sum, number] of each group of adjacent costs that are averaged
    for count in sorted(costs):
        pools.append([costs[count], 1])
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            total, number = pools.pop()
            pools[-1] = [pools[-1][0] + total, pools[-1][1] + number]
    return dict(zip(sorted(costs), np.concatenate([[total / number] * number for total, number in pools]).tolist()))


def load_or_measure(request: CostRequest, measure: Callable[[CostRequest], CostTable],
                    file: str | os.PathLike | None = None) -> CostTable:
    """Reads the table of a request from its file. If the file does not exist, measures and writes the table.

    Args:
      measure: returns the table of a request.
      file: file of the table. If None, the key of the request determines a file in the user's cache.

    Raises:
      ValueError: the file holds no table or another table, or cannot be written.
    """
    key = json.loads(json.dumps(request.key()))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = pathlib.Path(file or f'{_CACHE}/{request.model}_{digest}.json').expanduser()
    if path.exists():
        table = _read(path)
        if different := [name for name in key if table.key.get(name) != key[name]]:
            name = different[0]
            raise ValueError(f'--costs={path} holds costs for {name}={table.key.get(name)}, and {name}={key[name]} is '
                             'needed: give another file, and they are measured again')
        logging.info('costs are read from %s', path)
        return table
    report.check_writable('--costs', path)
    table = measure(request)._replace(key=key)
    report.write_json(path, table._asdict())
    logging.info('costs are written to %s', path)
    return table


def _read(path: pathlib.Path) -> CostTable:
    try:
        content = json.loads(path.read_text())
        parts = {name: content[name] for name in COUNTED_PARTS}
        parts = {name: {reducer: _by_count(costs) for reducer, costs in part.items()} if name == 'reduction' else
                 _by_count(part) for name, part in parts.items()}
        return CostTable(content['key'], content['outside'], content['dense'], **parts)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'--costs={path} holds no costs ({error}): delete it, and they are measured again') from error


def _by_count(costs):
    return {int(count): cost for count, cost in costs.items()}
