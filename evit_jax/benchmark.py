"""Measures: python -m evit_jax.benchmark input --config configs/deit_s.py --workers 4

input: images per second, and per CPU-second, of each stage of the input, of the whole pipeline with so many worker
processes, and of a plain Pillow pipeline. On the config's training split; on JPEGs made up, of 500 x 375, where there
is none.
"""

from absl import flags, logging
from ml_collections import config_flags

from evit_jax import commandline
from evit_jax.benchmarks import input as input_speed
from evit_jax.benchmarks import report
from evit_jax.data.generated import GeneratedSource
from evit_jax.training import inputs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/deit_s.py.')
_WORKERS = flags.DEFINE_integer('workers', None, 'Processes of the input; as config.data.workers if not given.',
                                lower_bound=0)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Time to measure, about.', lower_bound=0.1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Batch size; small enough for many batches in the time.', lower_bound=1)
_JSON = flags.DEFINE_string('json', None, 'File that the figures are written to, with machine, versions and date.')

_PICTURE = 500, 375  # about what ImageNet's average is


def measure_input() -> None:
    """Prints and writes how fast the input of the config is."""
    config = _CONFIG.value
    if config is None:
        raise ValueError('give --config FILE, as in: python -m evit_jax.benchmark input --config configs/deit_s.py')
    source, said = _source(config)
    workers = config.data.workers if _WORKERS.value is None else _WORKERS.value
    about = {'measurement': 'input', 'images': said, 'image_size': config.model.image_size, 'batch_size': _BATCH.value,
             'repeats': config.data.repeats, 'augment': config.data.augment, 'workers': workers}
    print(', '.join(f'{name} {value}' for name, value in about.items()), flush=True)
    logging.set_verbosity(logging.WARNING)  # the pipelines would say what memory they take at every turn
    rows = input_speed.rows_of(input_speed.measure(
        source, inputs.train_transform(config), batch_size=_BATCH.value, repeats=config.data.repeats, workers=workers,
        seconds=_SECONDS.value))
    headers = ('', 'images/s', 'images/CPU-s', 'CPU µs per image shown')
    print(report.table(headers, [(row.pop('name'), *(f'{value:,.0f}' for value in row.values()))
                                 for row in [dict(row) for row in rows]]))
    if _JSON.value:
        report.write_json(_JSON.value, about | {'rows': rows})


def _source(config):
    """The config's training split, or generated JPEGs; and in words which."""
    if config.data.source != 'generated':
        try:
            return inputs.open_sources(config)[0], f'{config.data.source} in {config.data.path}'
        except FileNotFoundError as error:
            print(f'generated images, as the data are not there: {error}')
    source = GeneratedSource('train', config.model.image_size, config.model.classes or 1000, encoded=_PICTURE)
    return source, 'generated JPEGs of {} x {}'.format(*_PICTURE)


if __name__ == '__main__':
    commandline.run({'input': measure_input})
