"""Describes the data of a config: python -m evit_jax.describe --config configs/folder.py --config.data.path=DIR

The program prints the number of examples and classes, images per class, image sizes and unreadable images, and saves a
picture of a training batch. It reads a sample of the images; --check_all reads all of them.
"""

import functools
import pathlib

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.checkpoints import open_defaults
from evit_jax.checkpoints.workdir import flat
from evit_jax.data.sources import split_of
from evit_jax.data.survey import describe_classes, describe_sizes, survey
from evit_jax.data.transforms import mixing
from evit_jax.data.transforms.decode import decode
from evit_jax.runtime import backend, machine
from evit_jax.training import experiment, inputs, step
from evit_jax.viz.batch import batch_page

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, such as configs/folder.py.')
_SAMPLE = flags.DEFINE_integer('sample', 500, 'Number of images to read from each split.', lower_bound=1)
_CHECK_ALL = flags.DEFINE_bool('check_all', False, 'Read all images, and list every unreadable one.')
_PICTURE = flags.DEFINE_string('picture', 'batch.png', 'Path of the picture.')
_ROWS = flags.DEFINE_integer('rows', 8, 'Number of images in the picture.', lower_bound=1)
_COPIES = flags.DEFINE_integer('copies', 3, 'Number of augmented copies of each image.', lower_bound=1)

_MAX_LISTED = 10  # maximum number of unreadable images that are listed without --check_all


def main() -> None:
    """Describes the training and the test split, and draws a training batch."""
    if _CONFIG.value is None:
        raise ValueError('give --config FILE, as in: python -m evit_jax.describe --config configs/folder.py '
                         '--config.data.path=DIR')
    backend.start()
    config = _CONFIG.value
    config = experiment.with_values(config, open_defaults.resolve(flat(config)))
    inputs.train_transform(flat(config))  # raises an error for a wrong value
    if not pathlib.Path(_PICTURE.value).absolute().parent.is_dir():
        raise ValueError(f'--picture={_PICTURE.value}: its folder does not exist')
    train, test = inputs.open_sources(flat(config))
    for split, source in ((config.data.train_split, train), (config.data.test_split, test)):
        _describe(split_of(source, split), source, machine.resolve_workers(config.data.workers))
    _draw(config, train)


def _describe(split, source, workers):
    print(f'{split}: {len(source):,} examples, {source.num_classes:,} classes', flush=True)
    if not _CHECK_ALL.value:
        workers = 0  # reading the sample takes less time than starting worker processes
    result = survey(source, None if _CHECK_ALL.value else _SAMPLE.value, workers=workers)
    scope = 'all' if result.num_surveyed == len(source) else f'{result.num_surveyed:,}'
    labels = getattr(source, 'labels', result.labels if scope == 'all' else None)
    if labels is not None and len(labels):
        print(f'  images of a class: {describe_classes(labels, source.class_names)}')
    else:
        num_classes = len(set(result.labels.tolist()))
        print(f'  images of a class: {num_classes:,} classes are among {scope}; --check_all counts')
    if len(result.sizes):
        print(f'  sizes ({scope}): {describe_sizes(result.sizes)}')
    print(f'  cannot be read ({scope}): {len(result.failed):,}')
    for message in result.failed if _CHECK_ALL.value else result.failed[:_MAX_LISTED]:
        print(f'    {message}')


def _draw(config, source):
    """Draws images as stored, after augmentation, and after mixing."""
    transform, examples, stored = inputs.train_transform(flat(config)), [], []
    # More candidates than rows, because some may be unreadable.
    for index in np.linspace(0, len(source) - 1, 4 * _ROWS.value).astype(int).tolist():
        try:
            example = source[index]
            stored.append(decode(example['image']))
            examples.append(example)
        except (ValueError, OSError):
            continue
    if not stored:
        raise ValueError('none of the images tried can be read: there is no picture')
    rows = np.linspace(0, len(stored) - 1, min(_ROWS.value, len(stored))).astype(int).tolist()
    stored, examples = [stored[row] for row in rows], [examples[row] for row in rows]
    augmented = np.array([[transform(image, np.random.default_rng([config.seed, row, copy]))
                           for copy in range(_COPIES.value)] for row, image in enumerate(stored)])  # [B, C, S, S, 3]
    batch_page(stored, augmented, _mixed(config, augmented, [example['label'] for example in examples], source),
               names=[source.class_names[example['label']] for example in examples],
               ids=[example['id'] for example in examples], heading=_heading(config)).save(_PICTURE.value)
    print(f'a batch: {_PICTURE.value}')


def _mixed(config, augmented, labels, source):
    """Mixes the copies. Each column is mixed like the batch of one device. Returns None if the config mixes nothing."""
    settings = inputs.mixing_settings(flat(config))
    if not (settings.erase or settings.mixup or settings.cutmix):
        return None
    mean, std = np.array(config.data.mean), np.array(config.data.std)
    rows, copies = augmented.shape[:2]
    images = augmented.swapaxes(0, 1).reshape(-1, *augmented.shape[2:])  # [C * B, S, S, 3]
    mix = jax.jit(functools.partial(mixing.mix_batch, mixing=settings, classes=source.num_classes, groups=copies))
    mixed, _ = mix(step.normalise(images, mean, std), np.tile(labels, copies), jax.random.key(config.seed))
    pixels = np.clip((np.asarray(mixed) * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return pixels.reshape(copies, rows, *augmented.shape[2:]).swapaxes(0, 1)


def _heading(config):
    data, mix = config.data, config.mixing
    return (f'{data.source}: crop {tuple(data.crop) or "none"}, flip {data.flip}, {data.augment}, erase {mix.erase}, '
            f'mixup {mix.mixup}, cutmix {mix.cutmix}')


if __name__ == '__main__':
    cli.run(main)
