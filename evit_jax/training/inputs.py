"""Creates the sources, transforms and mixing settings of a flat config."""

import os
from collections.abc import Mapping
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.data import sources, splits
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.label_maps import LabelMaps
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms.geometry import EvalTransform, TrainTransform
from evit_jax.data.transforms.mixing import Mixing
from evit_jax.runtime import agreement, distributed
from evit_jax.training import identity


def open_sources(config: Mapping[str, Any]) -> tuple[Source, Source]:
    """Opens the training source and the test source.

    Raises:
      ValueError: the source is unknown, the number of classes differs from the model, or another process has different
        data.
      OSError: the data are missing or unreadable.
    """
    train, test = _open(config, 'train', 'test')
    _warn_of_overlap(config, train, test)
    return train, test


def open_test_source(config: Mapping[str, Any]) -> Source:
    """Opens the test source. The training data may be missing.

    Raises:
      ValueError, OSError: see `open_sources`.
    """
    test, = _open(config, 'test')
    if {each.split for each in getattr(test, 'slices', ())} & {*splits.base_names(config['data.train_split'])}:
        train, = _open(config, 'train')
        _warn_of_overlap(config, train, test)
    logging.info('data: %s images to evaluate on: split %s of %s, %d classes', f'{len(test):,}',
                 sources.split_of(test, config['data.test_split']), describe_data(config), test.num_classes)
    return test


def check_classes(opened: tuple[Source, ...], classes: int) -> tuple[Source, ...]:
    """Checks that the sources have the number of classes of the model, and returns them. 0 accepts any number.

    Raises:
      ValueError: a source has another number of classes.
    """
    for source in opened:
        if classes not in (0, source.num_classes):
            raise ValueError(f'config.model.classes={classes}, but the data has {source.num_classes} classes: set it '
                             'so, or to 0')
    return opened


def describe_data(config: Mapping[str, Any]) -> str:
    """Describes the data of a config for messages, such as 'folder images'."""
    source, name, path = (config[f'data.{key}'] for key in ('source', 'name', 'path'))
    return ' '.join((source, *{'folder': (path,), 'tfds': (name, path)}.get(source, ())))


def _open(config, *names):
    """Opens the splits `train`, `test` or both. Process 0 opens them first, because it builds data and indexes."""
    splits_to_open = [config[f'data.{name}_split'] for name in names]

    def open_all():
        return [sources.open_source(
            config['data.source'], split, path=config['data.path'], dataset=config['data.name'],
            image_size=config['model.image_size'], num_classes=config['model.classes'], seed=config['seed'],
            cache=config['data.index_cache']) for split in splits_to_open]

    opened = distributed.on_process_zero(open_all)
    result = agreement.on_every_process(lambda: opened or open_all())
    agreement.check_same(identity.of_sources(dict(zip(splits_to_open, result))), 'give all processes the same data')
    return result


def _warn_of_overlap(config, train, test):
    if shared := splits.overlap(getattr(train, 'slices', ()), getattr(test, 'slices', ())):
        logging.warning('%d of the examples to evaluate on are trained on, too: data.train_split=%r, '
                        'data.test_split=%r', shared, config['data.train_split'], config['data.test_split'])


def token_targets(folder: str | os.PathLike, source: Source, grid: tuple[int, int]) -> TokenTargets | None:
    """Returns the token labels of the images of a source.

    Args:
      folder: folder of the label maps. If it is '', the result is None.
      grid: rows and columns of patches of the model.

    Raises:
      ValueError: the label maps are unfinished, or belong to other data.
      FileNotFoundError: the label maps do not exist.
    """
    if not folder:
        return None

    def opened():
        maps = LabelMaps(folder)
        maps.check(source)
        return maps

    maps = agreement.on_every_process(opened)
    if not distributed.is_single_process():
        agreement.check_same({f'the label maps in {folder}': maps.fingerprint}, 'give all processes the same maps')
    return TokenTargets(maps, grid)


def train_transform(config: Mapping[str, Any]) -> TrainTransform:
    """Returns the transform of training images."""
    return TrainTransform(
        _image_size(config), scale=tuple(config['data.crop']) or None, ratio=tuple(config['data.ratio']),
        flip=config['data.flip'], policy=config['data.augment'], colour_jitter=config['data.colour_jitter'])


def eval_transform(config: Mapping[str, Any]) -> EvalTransform:
    """Returns the transform of evaluation images."""
    return EvalTransform(_image_size(config), crop=config['data.eval_crop'] or None,
                         interpolation=config['data.interpolation'] or 'bicubic')


def _image_size(config):
    size = models.image_size_of(config)
    if size is None:
        raise ValueError('config.model.image_size=0 is the size of the weights in init_from, which are not read here: '
                         'give --config.model.image_size=224')
    return size


def mixing_settings(config: Mapping[str, Any]) -> Mixing:
    """Returns the settings for mixing training batches on the devices."""
    return Mixing(*(config[f'mixing.{name}'] for name in ('erase', 'mixup', 'cutmix', 'switch')),
                  config['label_smoothing'])
