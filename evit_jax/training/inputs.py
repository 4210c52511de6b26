"""Creates the sources, transforms and mixing settings of a config."""

import math
from typing import Any

from absl import logging

from evit_jax import models
from evit_jax.data import sources, splits
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.label_maps import LabelMaps
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms.geometry import EvalTransform, TrainTransform
from evit_jax.data.transforms.mixing import Mixing
from evit_jax.models.config import ImageSize
from evit_jax.runtime import agreement, distributed
from evit_jax.training import identity


def open_sources(config: Any) -> tuple[Source, Source]:
    """Opens the training source and the test source.

    Raises:
      ValueError: the source is unknown, the number of classes differs from the model, or another process has different
        data.
      OSError: the data are missing or unreadable.
    """
    train, test = _open(config, 'train', 'test')
    _warn_of_overlap(config, train, test)
    return train, test


def open_test_source(config: Any) -> Source:
    """Opens the test source. The training data may be missing.

    Raises:
      ValueError, OSError: see `open_sources`.
    """
    test, = _open(config, 'test')
    if {each.split for each in getattr(test, 'slices', ())} & {*splits.base_names(config.data.train_split)}:
        train, = _open(config, 'train')
        _warn_of_overlap(config, train, test)
    logging.info('data: %s images to evaluate on: split %s of %s, %d classes', f'{len(test):,}',
                 sources.split_of(test, config.data.test_split), describe_data(config), test.num_classes)
    return test


def describe_data(config: Any) -> str:
    """Describes the data of a config for messages, such as 'folder images'."""
    data = config.data
    return ' '.join((data.source, *{'folder': (data.path,), 'tfds': (data.name, data.path)}.get(data.source, ())))


def _open(config, *names):
    """Opens the splits `train`, `test` or both. Process 0 opens them first, because it builds data and indexes."""
    data = config.data

    def open_all():
        return [sources.open_source(
            data.source, split, path=data.path, dataset=data.name, image_size=config.model.image_size,
            num_classes=config.model.classes, seed=config.seed, cache=data.index_cache)
            for split in (data[f'{name}_split'] for name in names)]

    opened = distributed.on_process_zero(open_all)
    result = agreement.on_every_process(lambda: opened or open_all())
    agreement.check_same(identity.of_sources({data[f'{name}_split']: source for name, source in zip(names, result)}),
                         'give all processes the same data')
    return result


def _warn_of_overlap(config, train, test):
    if shared := splits.overlap(getattr(train, 'slices', ()), getattr(test, 'slices', ())):
        logging.warning('%d of the examples to evaluate on are trained on, too: data.train_split=%r, '
                        'data.test_split=%r', shared, config.data.train_split, config.data.test_split)


def token_targets(config: Any, source: Source, patches: int) -> TokenTargets | None:
    """Returns the token labels of the images of a source; None if the config has no label maps.

    Args:
      patches: number of patches of the model, in a square grid.

    Raises:
      ValueError: the label maps are unfinished, or belong to other data.
      FileNotFoundError: the label maps do not exist.
    """
    if not config.data.token_labels:
        return None

    def opened():
        maps = LabelMaps(config.data.token_labels)
        maps.check(source)
        return maps

    maps = agreement.on_every_process(opened)
    if not distributed.is_single_process():
        agreement.check_same({f'the label maps in {config.data.token_labels}': maps.fingerprint},
                            'give all processes the same maps')
    return TokenTargets(maps, math.isqrt(patches))


def image_size(config: Any) -> ImageSize:
    """Returns the image size of a config: the side of a square, or (height, width)."""
    return models.image_size_of({f'model.{key}': config.model[key] for key in ('image_size', 'image_width')})


def train_transform(config: Any) -> TrainTransform:
    """Returns the transform of training images."""
    data = config.data
    return TrainTransform(image_size(config), scale=tuple(data.crop) or None, ratio=tuple(data.ratio),
                          flip=data.flip, policy=data.augment, colour_jitter=data.colour_jitter)


def eval_transform(config: Any) -> EvalTransform:
    """Returns the transform of evaluation images."""
    return EvalTransform(image_size(config), crop=config.data.eval_crop or None)


def mixing_settings(config: Any) -> Mixing:
    """Returns the settings for mixing training batches on the devices."""
    mix = config.mixing
    return Mixing(mix.erase, mix.mixup, mix.cutmix, mix.switch, config.label_smoothing)
