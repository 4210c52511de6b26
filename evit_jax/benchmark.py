"""Measures: python -m evit_jax.benchmark input --config configs/deit_s.py --workers 4
          python -m evit_jax.benchmark tpu --config configs/deit_s.py --topology v5e:16x16

input: images per second, and per CPU-second, of each stage of the input, of the whole pipeline with so many worker
processes, and of a plain Pillow pipeline. On the config's training split; on JPEGs made up, of 500 x 375, where there
is none.

tpu: what the TPU compiler makes of the training and the evaluation step on a slice of TPUs, without a TPU: memory,
FLOPs, what the chips exchange, and its own estimate of the speed. Reads no data; needs the extra [tpu-aot].
"""

import importlib.metadata

import jax
from absl import flags, logging
from ml_collections import config_flags

from evit_jax import commandline, parallel
from evit_jax.benchmarks import input as input_speed
from evit_jax.benchmarks import report, tpu
from evit_jax.data.generated import GeneratedSource
from evit_jax.training import inputs
from evit_jax.training import run as runs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/deit_s.py.')
_WORKERS = flags.DEFINE_integer('workers', None, 'Processes of the input; as config.data.workers if not given.',
                                lower_bound=0)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Time to measure, about.', lower_bound=0.1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Batch size; small enough for many batches in the time.', lower_bound=1)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Slice of TPUs to compile for, as v5e:16x16.')
_BATCH_PER_CHIP = flags.DEFINE_integer('batch_per_chip', None, 'In place of config.batch_size, which is over all '
                                       'chips.', lower_bound=1)
_STEPS = flags.DEFINE_multi_enum('step', tpu.STEPS, tpu.STEPS, 'Which to compile for TPU.')
_STAGES = flags.DEFINE_bool('stages', False, 'Compile for every stage of the keep-rate schedule, not the last alone.')
_JSON = flags.DEFINE_string('json', None, 'File that the figures are written to, with machine, versions and date.')

_PICTURE = 500, 375  # about what ImageNet's average is


def measure_input() -> None:
    """Prints and writes how fast the input of the config is."""
    config = _config('input --config configs/deit_s.py')
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


def compile_for_tpu() -> None:
    """Prints and writes what the compiler says of the config's steps on a slice."""
    example = 'tpu --config configs/deit_s.py --topology v5e:16x16'
    config, topology = _config(example).copy_and_resolve_references(), _TOPOLOGY.value
    if topology is None:
        raise ValueError(f'give --topology SLICE, as in: python -m evit_jax.benchmark {example}')
    devices, chip = tpu.devices_of(topology), tpu.chip_of(topology)
    if _BATCH_PER_CHIP.value:
        with config.unlocked():
            config.batch_size = _BATCH_PER_CHIP.value * len(devices) // chip.devices
    mesh = parallel.data_mesh(config.batch_size, devices)
    runs.check(config)
    sources = [GeneratedSource(split, config.model.image_size, config.model.classes or 1000)
               for split in GeneratedSource.splits]  # nothing is read of them
    run = runs.lay_out(config, mesh=mesh, sources=sources)
    about = {'measurement': 'tpu', 'estimate': 'of the compiler, not measured', 'topology': topology,
             'chips': len(devices) // chip.devices, 'model': config.model.name, 'parameters': _parameters(run),
             'batch_size': config.batch_size, 'sharding': config.sharding,
             'libtpu': importlib.metadata.version('libtpu')}
    print(', '.join(f'{name} {value}' for name, value in about.items()), flush=True)
    plans = [stage.plan for stage in run.stages] if _STAGES.value else [run.plan]
    programs = [tpu.compile_step(run, step, plan, topology) for step in _STEPS.value
                for plan in (plans if step == 'train' else [run.plan])]
    said = list(dict.fromkeys(program.plan for program in programs))
    print(*(f'plan {number}: {plan}' for number, plan in enumerate(said, 1)), sep='\n')
    print(report.table(('', *(f'{program.step}, plan {said.index(program.plan) + 1}' for program in programs)),
                       tpu.rows_of(programs, chip)))
    print(*tpu.remarks(programs, chip), sep='\n')
    if _JSON.value:
        report.write_json(_JSON.value, about | {'chip': chip._asdict(), 'programs': [
            program._asdict() | {'collectives': {kind: found._asdict() for kind, found in program.collectives.items()}}
            for program in programs]})


def _config(example):
    if _CONFIG.value is None:
        raise ValueError(f'give --config FILE, as in: python -m evit_jax.benchmark {example}')
    return _CONFIG.value


def _parameters(run):
    return sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state().params))


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
    commandline.run({'input': measure_input, 'tpu': compile_for_tpu})
