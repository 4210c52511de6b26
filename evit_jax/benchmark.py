"""Measures: python -m evit_jax.benchmark input --config configs/deit_s.py --workers 4
          python -m evit_jax.benchmark model --models deit_s --rates 1,0.7,0.5 --batches 1,16 --dtypes float32
          python -m evit_jax.benchmark model --models runs/digits --batches 16 --json speed.json
          python -m evit_jax.benchmark tpu --config configs/deit_s.py --topology v5e:16x16

input: images per second, and per CPU-second, of each stage of the input, of the whole pipeline with so many worker
processes, and of a plain Pillow pipeline. On the config's training split; on JPEGs made up, of 500 x 375, where there
is none.

model: parameters, MACs, compile time, memory, images per second and latency of every combination of the lists given,
all in turns, on one device; with --train of the config's training step as well, with --against=torch of a plain
PyTorch EViT beside it. --models takes names, and folders of runs or of converted weights: these are measured with their
own model config, image size, blocks and reducer, and under their own plan beside the rates. What --json writes is taken
by `visualize tradeoff`, with the run. On a CPU, `taskset` says how many threads there are.

tpu: what the TPU compiler makes of the training and the evaluation step on a slice of TPUs, without a TPU: memory,
FLOPs, what the chips exchange, and its own estimate of the speed. Reads no data; needs the extra [tpu-aot].
"""

import dataclasses
import pathlib

import jax
from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli
from evit_jax.benchmarks import cases, model, model_tables, report, tpu
from evit_jax.benchmarks import input as input_speed
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.reduction.gather import GATHERS
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.reducers import EVIT, REDUCERS
from evit_jax.runtime import backend, machine, sharding
from evit_jax.training import checks, experiment, inputs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, as configs/deit_s.py.')
_WORKERS = flags.DEFINE_integer('workers', None, 'Processes of the input, -1: by the number of cores; as '
                                'config.data.workers if not given.', lower_bound=-1)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Time to measure, about.', lower_bound=0.1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Batch size; small enough for many batches in the time.', lower_bound=1)
_TOPOLOGY = flags.DEFINE_string('topology', None, 'Slice of TPUs to compile for, as v5e:16x16.')
_BATCH_PER_CHIP = flags.DEFINE_integer('batch_per_chip', None, 'In place of config.batch_size, which is over all '
                                       'chips.', lower_bound=1)
_STEPS = flags.DEFINE_multi_enum('step', tpu.STEPS, tpu.STEPS, 'Which to compile for TPU.')
_STAGES = flags.DEFINE_bool('stages', False, 'Compile for every stage of the keep-rate schedule, not the last alone.')
_MODELS = flags.DEFINE_list('models', ['deit_s'], 'Models to measure: names, and folders of runs or converted weights.')
_RATES = flags.DEFINE_list('rates', ['1', '0.7', '0.5'], "Keep rates; 1 is dense. A run's own plan is measured too.")
_FUSE = flags.DEFINE_list('fuse', None, 'Whether dropped tokens are fused: true, false or both. If not given, as the '
                          'run was trained; true for a named model.')
_SIZES = flags.DEFINE_list('image_sizes', [], "Image sizes; each model's own if not given.")
_BATCHES = flags.DEFINE_list('batches', ['1', '16'], 'Batch sizes.')
_DTYPES = flags.DEFINE_list('dtypes', None, f'Of the computation: {", ".join(cases.DTYPES)}. If not given, as the run '
                            'was trained; float32 for a named model.')
_REDUCE_AT = flags.DEFINE_list('reduce_at', [], 'Blocks that drop tokens; if not given, those of the run, and at a '
                               'quarter, half and three quarters of a named model.')
_REDUCERS = flags.DEFINE_list('reducers', None, f'How tokens are reduced: {", ".join(REDUCERS)}. If not given, as the '
                              'run was trained; evit for a named model.')
_LOWERINGS = flags.DEFINE_list('gather_impls', ['best'], 'How reductions move tokens: best (on this platform), '
                               f'{", ".join(GATHERS)}.')
_R = flags.DEFINE_list('r', [], 'Tokens that every block merges, beside the rates, of the reducers that merge.')
_PLANS = flags.DEFINE_multi_string('plan', [], 'A file of the planner (python -m evit_jax.plan), to be measured beside '
                                   'the rates; may be given again.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Times that everything is measured.', lower_bound=1)
_TRAIN = flags.DEFINE_bool('train', False, "Measure the training step of --config, too, with each model, rate and so "
                           "on in place of the config's.")
_AGAINST = flags.DEFINE_enum('against', None, ['torch'], 'Measure PyTorch beside, if it is installed.')
_MARKDOWN = flags.DEFINE_string('markdown', None, 'File that the tables are written to.')
_JSON = flags.DEFINE_string('json', None, 'File that the figures are written to, with machine, versions and date.')

_PICTURE = 500, 375  # about what ImageNet's average is


def measure_input() -> None:
    """Prints and writes how fast the input of the config is."""
    config = _config('input --config configs/deit_s.py')
    source, said = _source(config)
    workers = machine.resolve_workers(config.data.workers if _WORKERS.value is None else _WORKERS.value)
    metadata = {'measurement': 'input', 'images': said, 'image_size': config.model.image_size,
                'batch_size': _BATCH.value, 'repeats': config.data.repeats, 'augment': config.data.augment,
                'workers': workers}
    print(', '.join(f'{name} {value}' for name, value in metadata.items()), flush=True)
    logging.set_verbosity(logging.WARNING)  # the pipelines would say what memory they take at every turn
    rows = input_speed.rows_of(input_speed.measure(
        source, inputs.train_transform(config), batch_size=_BATCH.value, repeats=config.data.repeats, workers=workers,
        seconds=_SECONDS.value))
    headers = ('', 'images/s', 'images/CPU-s', 'CPU µs per image shown')
    print(report.table(headers, [(row.pop('name'), *(f'{value:,.0f}' for value in row.values()))
                                 for row in [dict(row) for row in rows]]))
    if _JSON.value:
        report.write_json(_JSON.value, metadata | {'rows': rows})


def measure_model() -> None:
    """Prints and writes how fast models are."""
    backend.start()
    numbers = cli.numbers
    chosen = cases.combine(
        names=_MODELS.value, rates=numbers('rates', _RATES.value, float),
        fuse=cases.choices('--fuse', _FUSE.value, {'true': True, 'false': False}),
        sizes=numbers('image_sizes', _SIZES.value, int), batches=numbers('batches', _BATCHES.value, int),
        dtypes=cases.choices('--dtypes', _DTYPES.value, {name: name for name in cases.DTYPES}),
        reduce_at=numbers('reduce_at', _REDUCE_AT.value, int), train=_TRAIN.value, methods=_REDUCERS.value,
        merged=numbers('r', _R.value, int), planned=[read_plan_file(file) for file in _PLANS.value],
        gather_impls=cases.choices('--gather_impls', _LOWERINGS.value,
                                   {'best': '', **{name: name for name in GATHERS}}))
    if other := [case for case in chosen if _AGAINST.value and case.reducer != EVIT]:
        raise ValueError(f'--against={_AGAINST.value} is of an EViT and knows no {other[0].reducer}: leave one of them '
                         'out')
    if two_heads := [case for case in chosen if _AGAINST.value and case.config.distilled]:
        raise ValueError(f'--against={_AGAINST.value} has no distillation token, and {two_heads[0]} has one: leave one '
                         'of them out')
    configs = {case: _config_of(case) for case in chosen if case.train}
    report.check_writable('--json', _JSON.value)
    report.check_writable('--markdown', _MARKDOWN.value)
    jax.config.update('jax_enable_compilation_cache', False)  # or its compile times would be those of reading

    def run_of(case):
        return experiment.setup(configs[case], mesh=sharding.data_mesh(case.batch, jax.devices()[:1]),
                            sources=_generated(configs[case]))

    measured = model.measure(chosen, rounds=_ROUNDS.value, seconds=_SECONDS.value, against=_AGAINST.value == 'torch',
                             run_of=run_of)
    print(model_tables.metadata(measured))
    print(*(report.table(*table) for table in model_tables.tables(measured)), sep='\n\n')
    print(*model_tables.remarks(measured), sep='\n')
    if _JSON.value:
        report.write_json(_JSON.value, {'measurement': 'model'} | measured)
    if _MARKDOWN.value:
        pathlib.Path(_MARKDOWN.value).write_text(model_tables.markdown(measured))


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
    mesh = sharding.data_mesh(config.batch_size, devices)
    checks.check(config)
    run = experiment.setup(config, mesh=mesh, sources=_generated(config))
    metadata = {'measurement': 'tpu', 'estimate': 'of the compiler, not measured', 'topology': topology,
             'chips': len(devices) // chip.devices, 'model': config.model.name, 'parameters': _parameters(run),
             'batch_size': config.batch_size, 'sharding': config.sharding, 'libtpu': tpu.version()}
    print(', '.join(f'{name} {value}' for name, value in metadata.items()), flush=True)
    plans = [stage.plan for stage in run.stages] if _STAGES.value else [run.plan.in_training()]
    programs = [tpu.compile_step(run, step, plan, topology) for step in _STEPS.value
                for plan in (plans if step == 'train' else [run.plan])]
    said = list(dict.fromkeys(program.plan for program in programs))
    print(*(f'plan {number}: {plan}' for number, plan in enumerate(said, 1)), sep='\n')
    print(report.table(('', *(f'{program.step}, plan {said.index(program.plan) + 1}' for program in programs)),
                       tpu.rows_of(programs, chip)))
    print(*tpu.remarks(programs, chip), sep='\n')
    if _JSON.value:
        report.write_json(_JSON.value, metadata | {'chip': chip._asdict(), 'programs': [
            program._asdict() | {'collectives': {kind: found._asdict() for kind, found in program.collectives.items()}}
            for program in programs]})


def _config(example):
    if _CONFIG.value is None:
        raise ValueError(f'give --config FILE, as in: python -m evit_jax.benchmark {example}')
    return _CONFIG.value


def _config_of(case):
    """The config with what a case measures in place of its own."""
    config = _config('model --train --config configs/deit_s.py').copy_and_resolve_references()
    with config.unlocked():
        for field in {field.name for field in dataclasses.fields(case.config)} & {*config.model}:
            config.model[field] = getattr(case.config, field)
        config.model.update(name=case.model, dtype=case.dtype, gather_impl=case.gather_impl, reduce_at=case.reduce_at,
                            fuse=case.fused)
        config.reducer.update(name=case.reducer.name, r=case.r, decreasing=False)
        config.keep.update(rate=case.rate, rates=(), tokens=case.tokens, macs=0.0, start_epoch=0, shrink_epochs=0)
        config.batch_size = jax.device_count()  # whatever passes: a case is measured on one device
        checks.check(config)
        config.batch_size = case.batch
    return config


def _generated(config):
    """Sources of which nothing is read."""
    return [GeneratedSource(split, config.model.image_size, config.model.classes or 1000)
            for split in GeneratedSource.splits]


def _parameters(run):
    return run.model.config.parameters()


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
    cli.run({'input': measure_input, 'model': measure_model, 'tpu': compile_for_tpu})
