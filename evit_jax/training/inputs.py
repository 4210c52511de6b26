"""Sources, transforms and mixing settings for a config."""

import math
from typing import Any

from absl import logging

from evit_jax.data import sources, splits
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.label_maps import LabelMaps
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms.geometry import EvalTransform, TrainTransform
from evit_jax.data.transforms.mixing import Mixing
from evit_jax.runtime import agreement, distributed
from evit_jax.training import identity


def open_sources(config: Any) -> tuple[Source, Source]:
    """Opens the sources to train on and to evaluate on.

    Raises:
      ValueError: unknown source, another number of classes than the model's, or different data in another process.
      OSError: the data are absent or unreadable.
    """
    train, test = _open(config, 'train', 'test')
    _warn_of_overlap(config, train, test)
    return train, test


def open_test_source(config: Any) -> Source:
    """Opens the source to evaluate on. The data to train on may be absent.

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
    """Describes the data of a config for messages, as in 'folder images'."""
    data = config.data
    return ' '.join((data.source, *{'folder': (data.path,), 'tfds': (data.name, data.path)}.get(data.source, ())))


def _open(config, *names):
    """Opens the splits named `train`, `test` or both. Process 0 goes first, because it builds data and indexes."""
    data = config.data

    def open_all():
        return [sources.open_source(
            data.source, split, path=data.path, dataset=data.name, image_size=config.model.image_size,
            num_classes=config.model.classes, seed=config.seed, cache=data.index_cache)
            for split in (data[f'{name}_split'] for name in names)]

    opened = distributed.on_process_zero(open_all)
    found = agreement.on_every_process(lambda: opened or open_all())
    agreement.check_same(identity.of_sources({data[f'{name}_split']: source for name, source in zip(names, found)}),
                         'give all processes the same data')
    return found


def _warn_of_overlap(config, train, test):
    if shared := splits.overlap(getattr(train, 'slices', ()), getattr(test, 'slices', ())):
        logging.warning('%d of the examples to evaluate on are trained on, too: data.train_split=%r, '
                        'data.test_split=%r', shared, config.data.train_split, config.data.test_split)


def token_targets(config: Any, source: Source, patches: int) -> TokenTargets | None:
    """Returns the targets for the tokens of the source's images; None if the config has no label maps.

    Args:
      patches: number of patches of the model, in a square grid.

    Raises:
      ValueError: the label maps are unfinished, or those of other data.
      FileNotFoundError: there are none.
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


def train_transform(config: Any) -> TrainTransform:
    """Returns the transform of training images."""
    data = config.data
    return TrainTransform(config.model.image_size, scale=tuple(data.crop) or None, ratio=tuple(data.ratio),
                          flip=data.flip, policy=data.augment, colour_jitter=data.colour_jitter)


def eval_transform(config: Any) -> EvalTransform:
    """Returns the transform of evaluation images."""
    return EvalTransform(config.model.image_size, crop=config.data.eval_crop or None)


def mixing_settings(config: Any) -> Mixing:
    """Returns the settings for mixing training batches on the devices."""
    mix = config.mixing
    return Mixing(mix.erase, mix.mixup, mix.cutmix, mix.switch, config.label_smoothing)
