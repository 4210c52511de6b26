"""What a run reads, made from its config: sources and transforms."""

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
    """The examples to train on and those to evaluate on.

    Raises:
      ValueError, OSError: no such source, nothing at its path, other classes than the model has, or other data in
        another process.
    """
    train, test = _open(config, 'train', 'test')
    _warn_of_overlap(config, train, test)
    return train, test


def open_test_source(config: Any) -> Source:
    """The examples to evaluate on; those to train on need not be there.

    Raises:
      ValueError, OSError: as in `open_sources`.
    """
    test, = _open(config, 'test')
    if {each.split for each in getattr(test, 'slices', ())} & {*splits.base_names(config.data.train_split)}:
        train, = _open(config, 'train')
        _warn_of_overlap(config, train, test)
    logging.info('data: %s images to evaluate on: split %s of %s, %d classes', f'{len(test):,}',
                 sources.split_of(test, config.data.test_split), described(config), test.num_classes)
    return test


def described(config: Any) -> str:
    """The data of a config for messages, as in 'folder images'."""
    data = config.data
    return ' '.join((data.source, *{'folder': (data.path,), 'tfds': (data.name, data.path)}.get(data.source, ())))


def _open(config, *names):
    """Opens the splits for `train`, `test` or both. Process 0 goes first: it builds and lists what the others read."""
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
    """What the tokens of the source's images are to be told, on a square grid; None where config has no maps.

    Raises:
      ValueError, FileNotFoundError: no label maps, unfinished ones, or those of other data.
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
    """From a decoded image to what is trained on."""
    data = config.data
    return TrainTransform(config.model.image_size, scale=tuple(data.crop) or None, ratio=tuple(data.ratio),
                          flip=data.flip, policy=data.augment, colour_jitter=data.colour_jitter)


def eval_transform(config: Any) -> EvalTransform:
    """From a decoded image to what is evaluated."""
    return EvalTransform(config.model.image_size, crop=config.data.eval_crop or None)


def mixing_settings(config: Any) -> Mixing:
    """What the devices do to a batch that is trained on."""
    mix = config.mixing
    return Mixing(mix.erase, mix.mixup, mix.cutmix, mix.switch, config.label_smoothing)
