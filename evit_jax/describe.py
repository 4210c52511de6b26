"""Describes the data of a config: python -m evit_jax.describe --config configs/folder.py --config.data.path=DIR

Sizes, classes, images of a class, image sizes, what cannot be read; and a picture of a batch as the model sees it.
Reads a sample, or every image with --check_all.
"""

import functools
import pathlib

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.checkpoints import preprocessing
from evit_jax.data.sources import split_of
from evit_jax.data.survey import classes_said, sizes_said, survey
from evit_jax.data.transforms import mixing
from evit_jax.data.transforms.decode import decode
from evit_jax.runtime import backend, machine
from evit_jax.training import inputs, step
from evit_jax.viz.batch import batch_page

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/folder.py.')
_SAMPLE = flags.DEFINE_integer('sample', 500, 'Images of a split that are read.', lower_bound=1)
_CHECK_ALL = flags.DEFINE_bool('check_all', False, 'Read all images, and name every one that cannot be read.')
_PICTURE = flags.DEFINE_string('picture', 'batch.png', 'File of the picture.')
_ROWS = flags.DEFINE_integer('rows', 8, 'Images in the picture.', lower_bound=1)
_COPIES = flags.DEFINE_integer('copies', 3, 'Augmented copies of each.', lower_bound=1)

_NAMED = 10  # unreadable images that are named where not all are


def main() -> None:
    """Prints what is in both splits and draws a batch of the first."""
    if _CONFIG.value is None:
        raise ValueError('give --config FILE, as in: python -m evit_jax.describe --config configs/folder.py '
                         '--config.data.path=DIR')
    backend.start()
    config = preprocessing.filled(_CONFIG.value)
    inputs.train_transform(config)
    if not pathlib.Path(_PICTURE.value).absolute().parent.is_dir():
        raise ValueError(f'--picture={_PICTURE.value}: there is no folder for it')
    train, test = inputs.open_sources(config)
    for split, source in ((config.data.train_split, train), (config.data.test_split, test)):
        _describe(split_of(source, split), source, machine.resolve_workers(config.data.workers))
    _draw(config, train)


def _describe(split, source, workers):
    print(f'{split}: {len(source):,} examples, {source.num_classes:,} classes', flush=True)
    found = survey(source, None if _CHECK_ALL.value else _SAMPLE.value,
                   workers=workers if _CHECK_ALL.value else 0)  # a sample is read before the workers stand
    where = 'all' if found.asked == len(source) else f'{found.asked:,}'
    labels = getattr(source, 'labels', found.labels if where == 'all' else None)  # some sources know them unread
    if labels is not None and len(labels):
        print(f'  images of a class: {classes_said(labels, source.class_names)}')
    else:
        print(f'  images of a class: {len(set(found.labels.tolist())):,} classes are among {where}; --check_all counts')
    if len(found.sizes):
        print(f'  sizes ({where}): {sizes_said(found.sizes)}')
    print(f'  cannot be read ({where}): {len(found.failed):,}')
    for said in found.failed if _CHECK_ALL.value else found.failed[:_NAMED]:
        print(f'    {said}')


def _draw(config, source):
    """The picture: images as stored, augmented, and mixed."""
    transform, chosen, stored = inputs.train_transform(config), [], []
    for index in np.linspace(0, len(source) - 1, 4 * _ROWS.value).astype(int).tolist():  # some may be unreadable
        try:
            example = source[index]
            stored.append(decode(example['image']))
            chosen.append(example)
        except (ValueError, OSError):
            continue
    if not stored:
        raise ValueError('none of the images tried can be read: there is no picture')
    rows = np.linspace(0, len(stored) - 1, min(_ROWS.value, len(stored))).astype(int).tolist()
    stored, chosen = [stored[row] for row in rows], [chosen[row] for row in rows]
    augmented = np.array([[transform(image, np.random.default_rng([config.seed, row, copy]))
                           for copy in range(_COPIES.value)] for row, image in enumerate(stored)])  # [B, C, S, S, 3]
    batch_page(stored, augmented, _mixed(config, augmented, [example['label'] for example in chosen], source),
               names=[source.class_names[example['label']] for example in chosen],
               ids=[example['id'] for example in chosen], heading=_heading(config)).save(_PICTURE.value)
    print(f'a batch: {_PICTURE.value}')


def _mixed(config, augmented, labels, source):
    """The copies after mixing, each column as the share of one device; None where the config mixes nothing."""
    how = inputs.mixing_settings(config)
    if not (how.erase or how.mixup or how.cutmix):
        return None
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    rows, copies = augmented.shape[:2]
    images = augmented.swapaxes(0, 1).reshape(-1, *augmented.shape[2:])  # [C * B, S, S, 3]
    mix = jax.jit(functools.partial(mixing.mix_batch, mixing=how, classes=source.num_classes, groups=copies))
    mixed, _ = mix(step.normalise(images, mean, std), np.tile(labels, copies), jax.random.key(config.seed))
    bright = np.clip((np.asarray(mixed) * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return bright.reshape(copies, rows, *augmented.shape[2:]).swapaxes(0, 1)


def _heading(config):
    data, mix = config.data, config.mixing
    return (f'{data.source}: crop {tuple(data.crop) or "none"}, flip {data.flip}, {data.augment}, erase {mix.erase}, '
            f'mixup {mix.mixup}, cutmix {mix.cutmix}')


if __name__ == '__main__':
    cli.run(main)
