"""Label maps of images to train on: python -m evit_jax.label CHECKPOINT --config FILE --out DIR
                                  python -m evit_jax.label --published FOLDER --config FILE --out DIR

Of the training split of the config's data. CHECKPOINT is the folder of a run, whose model says which classes it sees at
each patch of an image; or FOLDER holds the published files, <class>/<image>.pt. DIR is made: train with
--config.data.token_labels=DIR. Told to stop by SIGTERM or Ctrl-C it keeps what is done and ends with code 75; the same
command goes on from there. Images that cannot be read are named and get no map.
"""

import functools

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.lock import WorkdirLock
from evit_jax.data.names import in_one_line
from evit_jax.data.token_labels import label_maps
from evit_jax.data.token_labels.label_maps import About, Entry, LabelMap
from evit_jax.inference.annotator import Annotator
from evit_jax.inference.held_out import check_classes, spread
from evit_jax.interchange import published_labels
from evit_jax.runtime import backend
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import inputs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, whose data are labelled.')
_OUT = flags.DEFINE_string('out', None, 'Folder of the label maps.')
_PUBLISHED = flags.DEFINE_string('published', None, 'Folder of published label maps, in place of a CHECKPOINT.')
_EMA = flags.DEFINE_bool('ema', False, 'The moving average of the weights.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', None, 'Pixels a side of the images that the model gets, squeezed to a '
                                   'square; as trained if not given. The map has a place for each patch.',
                                   lower_bound=1)
_BATCH = flags.DEFINE_integer('batch', 64, 'Images computed at a time.', lower_bound=1)

_LOOKED_FOR = 16  # published files that must be there before any is copied


def main(checkpoint: str = '') -> None:
    """Makes the maps, or goes on with them."""
    if _CONFIG.value is None or not _OUT.value or bool(checkpoint) == bool(_PUBLISHED.value):
        raise ValueError('give --config FILE, --out DIR, and either a CHECKPOINT or --published FOLDER, as in: python '
                         '-m evit_jax.label runs/digits --config configs/digits.py --out data/digits_labels')
    backend.start()
    source, _ = inputs.open_sources(_CONFIG.value)
    with PreemptionHandler() as stopping:
        annotator, top, side, entries = (_published if _PUBLISHED.value else _by_model)(
            checkpoint, source, stopping.check)
        data = _CONFIG.value.data
        metadata = About(annotator, ' '.join(filter(None, (
            data.source, data.name if data.source == 'tfds' else '', data.train_split))), tuple(source.class_names),
            source.num_classes, len(source), top, side)
        logging.info('%s examples, %d classes at each of %d x %d places, by %s', f'{len(source):,}', top, side, side,
                     annotator)
        label_maps.check_begun(_OUT.value, metadata)
        with WorkdirLock(_OUT.value):
            missing = label_maps.write(_OUT.value, metadata, entries)
    if missing:
        logging.warning('%d of %d examples have no label map', missing, len(source))


def _by_model(checkpoint, source, check):
    """Name, classes and side of the maps of a model, and what makes them."""
    trained = load_model(checkpoint, ema=_EMA.value)
    check_classes(trained, source)
    made = Annotator(trained._replace(image_size=_IMAGE_SIZE.value or trained.image_size), batch_size=_BATCH.value)
    return str(made), made.top, made.side, functools.partial(made.entries, source, check=check)


def _published(_, source, check):
    """As `_by_model`, of published files. Some are looked for at once; the first of them tells the size of all."""
    folder, classes = _PUBLISHED.value, source.num_classes

    def read(number):
        """The entry of an example; without a map where its image or its published file cannot be read."""
        name = f'example {number}'
        try:
            example = source[number]
            name, path = example['id'], published_labels.place_of(folder, example.get('path', example['id']))
            return Entry(name, LabelMap(*published_labels.read(path, classes)))
        except (OSError, ValueError) as error:
            return Entry(name, None, in_one_line(str(error)))

    looked = [read(number) for number in spread(len(source), _LOOKED_FOR)]
    shape = next((entry.made.value.shape for entry in looked if entry.made), None)
    if shape is None:
        raise ValueError(f'none of {len(looked)} published label maps looked for can be read, the last one as: '
                         f'{looked[-1].problem}')

    def entries(start):
        for number in range(start, len(source)):
            check()
            yield _of_shape(read(number), shape)

    for entry in looked:
        _of_shape(entry, shape)
    return 'published files', *shape[:2], entries


def _of_shape(entry: Entry, shape: tuple[int, ...]) -> Entry:
    """The entry, if its map has this shape."""
    if entry.made and entry.made.value.shape != shape:
        raise ValueError(f'the published file of {entry.example} holds a map of {list(entry.made.value.shape)}, '
                         f'the one of the first image is of {list(shape)}: remove the file that has the wrong size')
    return entry


if __name__ == '__main__':
    cli.run(main, '[CHECKPOINT]')
