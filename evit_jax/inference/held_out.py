"""Opens the test split of a run by the config in its checkpoint."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import read_metadata
from evit_jax.configs.base import absent
from evit_jax.data import sources, splits
from evit_jax.data.classes import readable_names, same_classes
from evit_jax.data.sources import Source

_DEFAULTS = absent('data.path', 'data.name', 'data.test_split', 'data.index_cache', 'seed', 'model.image_size')


def held_out(checkpoint: str | os.PathLike, classes: int, config: Mapping[str, Any] | None = None) -> Source:
    """Opens the evaluation split of a run's data.

    Args:
      classes: number of classes of the model.
      config: nested config to use instead of the one in the checkpoint.

    Raises:
      ValueError: the config names no data, or the data have another number of classes.
      OSError: the data are missing.
    """
    settings = _DEFAULTS | workdirs.flat(config or read_metadata(checkpoint).get('config', {}))
    if not config:
        settings['data.test_split'] = splits.from_record(settings['data.test_split'])
    if 'data.source' not in settings:
        raise ValueError(f'the checkpoint in {checkpoint} does not name its data (data.source of its config): give '
                         '--config FILE')
    return sources.open_source(
        settings['data.source'], settings['data.test_split'], path=settings['data.path'], dataset=settings['data.name'],
        image_size=settings['model.image_size'], num_classes=classes, seed=settings['seed'],
        cache=settings['data.index_cache'])


def check_classes(loaded: LoadedModel, source: Source) -> None:
    """Raises a ValueError if the model has no classes or other classes than the data, or orders them differently."""
    loaded.check_has_classes()
    origin = loaded.path or loaded.name
    if loaded.config.classes != source.num_classes:
        raise ValueError(f'the model in {origin} has {loaded.config.classes} classes, the data have '
                         f'{source.num_classes}: give a model that was trained on these classes, or other data')
    ours = readable_names(source.class_names)
    if not ours or same_classes(ours, loaded.class_names):
        return
    recorded = read_metadata(loaded.path).get('class_names') if loaded.path else None
    if loaded.class_names == tuple(map(str, range(len(ours)))) and not recorded:
        logging.warning('the weights in %s have no class names: their classes are assumed to be those of the data, in '
                        'this order', origin)
        return
    label = next(label for label, name in enumerate(ours) if name != loaded.class_names[label])
    raise ValueError(f'the model in {origin} was trained on other classes: {loaded.class_names[label]!r} is its class '
                     f'{label}, {ours[label]!r} that of the data: give a model that was trained on these classes, or '
                     'other data')


def spread(size: int, count: int) -> list[int]:
    """Returns at most `count` evenly spaced indices below `size`, including the first and the last one.

    Raises:
      ValueError: the size is 0.
    """
    if not size:
        raise ValueError('the data hold no images')
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(int)).tolist()
