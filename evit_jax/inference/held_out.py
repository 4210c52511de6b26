"""The images that a checkpoint was evaluated on, found again by the config that stands beside it."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.checkpoints.manager import read_metadata
from evit_jax.data import sources, splits
from evit_jax.data.classes import readable_names, same_classes
from evit_jax.data.sources import Source

_UNSAID = {'data.path': '', 'data.name': '', 'data.test_split': splits.AUTO, 'data.index_cache': None, 'seed': 0,
           'model.image_size': 224}


def held_out(checkpoint: str | os.PathLike, classes: int, config: Mapping[str, Any] | None = None) -> Source:
    """Opens the split of a run's data that it is evaluated on.

    Args:
      classes: of the model.
      config: nested, in place of the one that the checkpoint keeps.

    Raises:
      ValueError: neither says which data, or they have other classes.
      OSError: the data are not there.
    """
    told = _UNSAID | workdirs.flat(config or read_metadata(checkpoint).get('config', {}))
    if not config:
        told['data.test_split'] = splits.from_record(told['data.test_split'])
    if 'data.source' not in told:
        raise ValueError(f'the checkpoint in {checkpoint} does not say what it was trained on: give --config FILE')
    return sources.open_source(
        told['data.source'], told['data.test_split'], path=told['data.path'], dataset=told['data.name'],
        image_size=told['model.image_size'], num_classes=classes, seed=told['seed'], cache=told['data.index_cache'])


def check_classes(trained: LoadedModel, source: Source) -> None:
    """Raises a ValueError if the data have other classes than a model was trained on, or the same in another order."""
    if trained.config.classes != source.num_classes:
        raise ValueError(f'the model in {trained.path} tells {trained.config.classes} classes apart, the data have '
                         f'{source.num_classes}: give a model that was trained on these classes, or other data')
    ours = readable_names(source.class_names)
    if ours and not same_classes(ours, trained.class_names):
        if trained.class_names == (*map(str, range(len(ours))),) and not read_metadata(trained.path).get('class_names'):
            logging.warning('the weights in %s have no class names: their classes are assumed to be those of the data, '
                            'in this order', trained.path)
            return
        first = next(label for label, name in enumerate(ours) if name != trained.class_names[label])
        raise ValueError(f'the model in {trained.path} was trained on other classes: {trained.class_names[first]!r} is '
                         f'its class {first}, {ours[first]!r} that of the data: give a model that was trained on these '
                         'classes, or other data')


def spread(size: int, count: int) -> list[int]:
    """`count` of the numbers below `size`, or all where there are fewer, evenly spread.

    Raises:
      ValueError: no number at all.
    """
    if not size:
        raise ValueError('the data hold no images')
    return np.unique(np.linspace(0, size - 1, min(count, size)).round().astype(int)).tolist()
