"""Makes label maps for training images: python -m evit_jax.label CHECKPOINT --config FILE --out DIR
                                      python -m evit_jax.label --published FOLDER --config FILE --out DIR

The program labels the training split of the config's data, and writes the maps to DIR. CHECKPOINT is a run,
a file or folder of weights (.pth, .safetensors, Hugging Face, timm), or hf-hub:ORG/NAME; the model predicts the classes
of each patch. FOLDER holds published label maps, <class>/<image>.pt. To train with
the maps, give --config.data.token_labels=DIR. After SIGTERM or Ctrl-C the program keeps the maps written so far and
exits with code 75; run the same command again to continue. Unreadable images are listed and get no map.
"""

import functools

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.checkpoints.lock import WorkdirLock
from evit_jax.checkpoints.workdir import flat
from evit_jax.data.names import in_one_line
from evit_jax.data.token_labels import label_maps
from evit_jax.data.token_labels.label_maps import Entry, LabelMap, LabelMapsMetadata
from evit_jax.inference.annotator import Annotator
from evit_jax.inference.held_out import check_classes, spread
from evit_jax.interchange import published_labels
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import parse_size
from evit_jax.runtime import backend
from evit_jax.runtime.preemption import PreemptionHandler
from evit_jax.training import inputs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file that names the training data to label.')
_OUT = flags.DEFINE_string('out', None, 'Folder to write the label maps to.')
_PUBLISHED = flags.DEFINE_string('published', None, 'Folder of published label maps, instead of a CHECKPOINT.')
_EMA = flags.DEFINE_bool('ema', False, 'Use the moving average (EMA) of the weights.')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Side of the images, or HEIGHTxWIDTH, in pixels; default: as in '
                                  'training. A map has one cell for each patch.')
_BATCH = flags.DEFINE_integer('batch', 64, 'Batch size.', lower_bound=1)

_NUM_SAMPLED = 16  # number of published files that are checked before the first one is copied


def main(checkpoint: str = '') -> None:
    """Writes the maps, or continues an interrupted call."""
    if _CONFIG.value is None or not _OUT.value or bool(checkpoint) == bool(_PUBLISHED.value):
        raise ValueError('give --config FILE, --out DIR, and either a CHECKPOINT or --published FOLDER, as in: python '
                         '-m evit_jax.label runs/digits --config configs/digits.py --out data/digits_labels')
    backend.start()
    source, _ = inputs.open_sources(flat(_CONFIG.value))
    with PreemptionHandler() as preemption:
        annotator, top, grid, entries = (_from_published if _PUBLISHED.value else _from_model)(
            checkpoint, source, preemption.check)
        data = _CONFIG.value.data
        metadata = LabelMapsMetadata(annotator, ' '.join(filter(None, (
            data.source, data.name if data.source == 'tfds' else '', data.train_split))), tuple(source.class_names),
            source.num_classes, len(source), top, grid)
        logging.info('%s examples, %d classes in each of %d x %d cells, by %s', f'{len(source):,}', top, *grid,
                     annotator)
        label_maps.check_folder(_OUT.value, metadata)
        with WorkdirLock(_OUT.value):
            missing = label_maps.write(_OUT.value, metadata, entries)
    if missing:
        logging.warning('%d of %d examples have no label map', missing, len(source))


def _from_model(checkpoint, source, check):
    """Returns the annotator's name, the classes per cell, the grid of a map, and a function to get entries."""
    trained = open_model(checkpoint, ema=_EMA.value)
    check_classes(trained, source)
    image_size = parse_size(_IMAGE_SIZE.value, 'image_size') if _IMAGE_SIZE.value else trained.image_size
    annotator = Annotator(trained._replace(image_size=image_size), batch_size=_BATCH.value)
    return str(annotator), annotator.top, annotator.grid, functools.partial(annotator.entries, source, check=check)


def _from_published(_, source, check):
    """Returns the values of `_from_model` for published files. All maps must have the size of the first one."""
    folder, classes = _PUBLISHED.value, source.num_classes

    def read(number):
        """Returns the entry of an example. It has no map if the image or its published file is unreadable."""
        name = f'example {number}'
        try:
            example = source[number]
            name, path = example['id'], published_labels.label_map_path(folder, example.get('path', example['id']))
            return Entry(name, LabelMap(*published_labels.read_label_map(path, classes)))
        except (OSError, ValueError) as error:
            return Entry(name, None, in_one_line(str(error)))

    sampled = [read(number) for number in spread(len(source), _NUM_SAMPLED)]
    shape = next((entry.label_map.value.shape for entry in sampled if entry.label_map), None)
    if shape is None:
        raise ValueError(f'none of {len(sampled)} published label maps can be read; the last one: '
                         f'{sampled[-1].problem}')

    def entries(start):
        for number in range(start, len(source)):
            check()
            yield _check_shape(read(number), shape)

    for entry in sampled:
        _check_shape(entry, shape)
    return 'published files', shape[0], shape[1:], entries


def _check_shape(entry: Entry, shape: tuple[int, ...]) -> Entry:
    """Returns the entry after checking the shape of its map."""
    if entry.label_map and entry.label_map.value.shape != shape:
        raise ValueError(f'the published file of {entry.example} holds a map of {list(entry.label_map.value.shape)}, '
                         f'the one of the first image is of {list(shape)}: remove the file that has the wrong size')
    return entry


if __name__ == '__main__':
    cli.run(main, '[CHECKPOINT]')
