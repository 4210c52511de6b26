"""Measures speed: python -m evit_jax.benchmark input --config configs/deit_s.py --workers 4
                python -m evit_jax.benchmark model --models deit_s --rates 1,0.7,0.5 --batches 1,16 --dtypes float32
                python -m evit_jax.benchmark model --models runs/digits --batches 16 --json speed.json
                python -m evit_jax.benchmark serve runs/digits --clients 1,8,64
                python -m evit_jax.benchmark gpu --config configs/deit_s.py --dtypes bfloat16 --json gpu.json
                python -m evit_jax.benchmark tpu --config configs/deit_s.py --topology v5e:16x16

input measures images per second and per CPU-second of each input stage, of the whole pipeline with --workers processes,
and of a simple Pillow pipeline. It reads the training split of the config. If the data are missing, it generates JPEGs
of 500 x 375 pixels.

model measures parameters, MACs, compile time, memory, images per second and latency of every combination of the listed
values. All combinations run on one device and are timed interleaved. --train adds the training step of --config.
--against=torch adds EViT in plain PyTorch, --against=onnxruntime,openvino adds runtimes of ONNX on the CPU. --models
takes names of models, runs, files and folders of weights (.pth, .safetensors, Hugging Face, timm), and hf-hub:ORG/NAME.
A run is measured with its own model config, image size, blocks and reducer, and with its own plan in addition to the
rates. Pass the file of --json to `visualize tradeoff`, together with the run. On a CPU, limit the threads by `taskset`.

serve starts the server of evit_jax.serve on loopback, with each of --batches, and measures requests per second and
latency for the default and the dense plan. Then it offers twice the capacity for --overload_seconds, and sends
--hostile uploads: truncated files, decompression bombs, broken forms, slow bodies.

gpu measures DeiT-S, DeiT-B and DINOv2's ViT-S on one device within --minutes, the most important cases first: dense,
rates, ToMe and plans, batches of 64, 1 and 256, the training step, and implementations of attention.

tpu compiles the training and the evaluation step for a TPU slice and reports the compiler's figures: memory, FLOPs,
collectives, and an estimate of the speed. It needs no TPU and no data, but the extra [tpu-aot].
"""

import dataclasses
import pathlib

import jax
from absl import flags, logging
from ml_collections import config_flags

from evit_jax import cli, models
from evit_jax.benchmarks import gpu, input_speed, model_speed, model_tables, report, serve_load, tpu, workloads
from evit_jax.checkpoints.workdir import flat
from evit_jax.data.sources.generated import GeneratedSource
from evit_jax.models.config import parse_size
from evit_jax.reduction.gather import GATHERS
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.registry import list_reducers
from evit_jax.runtime import backend, machine, sharding
from evit_jax.serving import live_page
from evit_jax.training import checks, experiment, initial_model, inputs

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, for example configs/deit_s.py.')
_WORKERS = flags.DEFINE_integer('workers', None, 'Worker processes of the input; -1 chooses by the number of cores. '
                                'Defaults to config.data.workers.', lower_bound=-1)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Approximate time to measure.', lower_bound=0.1)
_BATCH = flags.DEFINE_integer('batch', 128, 'Batch size of the input; choose it so that many batches fit in --seconds.',
                              lower_bound=1)
_CLIENTS = flags.DEFINE_list('clients', ['1', '8', '64'], 'serve: numbers of concurrent clients.')
_OVERLOAD = flags.DEFINE_float('overload_seconds', 60.0, 'serve: time of the overload; 0 for none.', lower_bound=0)
_HOSTILE = flags.DEFINE_integer('hostile', 10_000, 'serve: number of hostile uploads.', lower_bound=0)
_ENGINE = flags.DEFINE_string('engine', 'jax', 'serve: engine of the server: jax, onnxruntime or openvino.')
_TOPOLOGY = flags.DEFINE_string('topology', None, 'TPU slice to compile for, for example v5e:16x16.')
_BATCH_PER_CHIP = flags.DEFINE_integer('batch_per_chip', None, 'Batch size per chip; replaces config.batch_size, which '
                                       'counts all chips.', lower_bound=1)
_STEPS = flags.DEFINE_multi_enum('step', tpu.STEPS, tpu.STEPS, 'Step to compile for TPU; may be repeated.')
_STAGES = flags.DEFINE_bool('stages', False, 'Compile every stage of the keep-rate schedule, not only the last one.')
_MODELS = flags.DEFINE_list('models', ['deit_s'], 'Names of models, runs, files or folders of weights, or '
                            'hf-hub:ORG/NAME.')
_RATES = flags.DEFINE_list('rates', ['1', '0.7', '0.5'], 'Keep rates; 1 is dense. The plan of a run is always added.')
_FUSE = flags.DEFINE_list('fuse', None, 'Fuse dropped tokens: true, false or both. Defaults to the setting of the run, '
                          'and to true for a named model.')
_SIZES = flags.DEFINE_list('image_sizes', [], 'Image sizes: sides, or HEIGHTxWIDTH. Defaults to the image size of '
                          'each model.')
_BATCHES = flags.DEFINE_list('batches', ['1', '16'], 'Batch sizes; serve: largest batches of the server.')
_DTYPES = flags.DEFINE_list('dtypes', None, f'Dtypes of the computation: {", ".join(machine.DTYPES)}. Defaults to '
                            'the dtype of the run, and to float32 for a named model.')
_REDUCE_AT = flags.DEFINE_list('reduce_at', [], 'Blocks that reduce tokens. Defaults to those of the run, and to a '
                               'quarter, half and three quarters of the depth of a named model.')
_REDUCERS = flags.DEFINE_list('reducers', None, f'Reducers: {", ".join(list_reducers())}. Defaults to the reducer of '
                              'the run, and to evit for a named model.')
_GATHER_IMPLS = flags.DEFINE_list('gather_impls', ['best'], 'Implementations of the gather in reductions: best (for '
                                  f'this platform), {", ".join(GATHERS)}.')
_R = flags.DEFINE_list('r', [], 'Numbers of tokens to merge in every block, in addition to the rates; only for '
                       'reducers that merge.')
_PLANS = flags.DEFINE_multi_string('plan', [], 'Plan file of python -m evit_jax.plan, measured in addition to the '
                                   'rates; may be repeated. A plan that names a reducer is measured with it, others '
                                   'with each of --reducers.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Number of rounds; each round times every combination.', lower_bound=1)
_TRAIN = flags.DEFINE_bool('train', False, 'Also measure the training step of --config, with the model, rate and other '
                           'settings of each combination.')
_AGAINST = flags.DEFINE_list('against', [], f'Also measure these engines: {", ".join(model_speed.AGAINST)}. ONNX '
                             'Runtime and OpenVINO run the ONNX files of the same models, on the CPU.')
_PRECISIONS = flags.DEFINE_list('precision', ['float32'], 'Precisions of the engines that run ONNX files: float32, '
                                'bfloat16 (OpenVINO, on a CPU that has it).')
_MINUTES = flags.DEFINE_float('minutes', 8.0, 'gpu: time limit. Cases that do not fit are listed.', lower_bound=0.01)
_MARKDOWN = flags.DEFINE_string('markdown', None, 'Markdown file to write the tables to.')
_JSON = flags.DEFINE_string('json', None, 'JSON file to write the results to, with machine, versions and date.')

_JPEG_SIZE = 500, 375  # width and height; about the mean size of ImageNet's images


def measure_input() -> None:
    """Measures the speed of the config's input pipeline; prints and writes the results."""
    config = _config('input --config configs/deit_s.py')
    source, description = _training_source(config)
    workers = machine.resolve_workers(config.data.workers if _WORKERS.value is None else _WORKERS.value)
    metadata = {'measurement': 'input', 'images': description, 'image_size': config.model.image_size,
                'batch_size': _BATCH.value, 'repeats': config.data.repeats, 'augment': config.data.augment,
                'workers': workers}
    print(', '.join(f'{name} {value}' for name, value in metadata.items()), flush=True)
    logging.set_verbosity(logging.WARNING)  # each pipeline would log its memory in every round
    rows = input_speed.json_rows(input_speed.measure(
        source, inputs.train_transform(flat(config)), batch_size=_BATCH.value, repeats=config.data.repeats,
        workers=workers, seconds=_SECONDS.value))
    headers = ('', 'images/s', 'images/CPU-s', 'CPU µs per image shown')
    print(report.table(headers, [(row.pop('name'), *(f'{value:,.0f}' for value in row.values()))
                                 for row in [dict(row) for row in rows]]))
    if _JSON.value:
        report.write_json(_JSON.value, metadata | {'rows': rows})


def measure_model() -> None:
    """Measures the speed of models; prints and writes the results."""
    backend.start()
    selected = _workloads()
    configs = {workload: _training_config(workload) for workload in selected if workload.train}
    report.check_writable('--json', _JSON.value)
    report.check_writable('--markdown', _MARKDOWN.value)
    jax.config.update('jax_enable_compilation_cache', False)  # otherwise compile times would only include cache reads

    measurement = model_speed.measure(selected, rounds=_ROUNDS.value, seconds=_SECONDS.value,
                                      against=_AGAINST.value, precisions=_PRECISIONS.value,
                                      setup_run=lambda workload: _setup_run(workload, configs[workload]))
    _write(measurement)
    _print(measurement)


def measure_gpu() -> None:
    """Measures the models of `gpu.MODELS`, or those of --models; prints and writes the results after each group."""
    backend.start()
    _config('gpu --config configs/deit_s.py')
    report.check_writable('--json', _JSON.value)
    report.check_writable('--markdown', _MARKDOWN.value)
    jax.config.update('jax_enable_compilation_cache', False)  # otherwise compile times would only include cache reads
    plans = [read_plan_file(file) for file in _PLANS.value]
    limits = gpu.Limits(minutes=_MINUTES.value, dtype=(_DTYPES.value or ['bfloat16'])[0])
    if _BATCHES.present:
        batches = cli.numbers('batches', _BATCHES.value, int)
        limits = limits._replace(batch_sizes=tuple(batches), train_batch=batches[0])
    measurement = gpu.measure(_gpu_models(), limits, against=_AGAINST.value, plans=plans, on_group=_write,
                              setup_run=lambda workload: _setup_run(workload, _training_config(workload)))
    _write(measurement)
    _print(measurement)


def _write(measurement):
    """Writes the results of model or gpu to the files of --json and --markdown."""
    if _JSON.value:
        report.write_json(_JSON.value, {'measurement': 'model'} | measurement)
    if _MARKDOWN.value:
        pathlib.Path(_MARKDOWN.value).write_text(model_tables.markdown(measurement))


def measure_serve(path: str) -> None:
    """Measures the HTTP server under load; prints and writes the results."""
    report.check_writable('--json', _JSON.value)
    settings = serve_load.ServeSettings(
        path, _ENGINE.value, cli.numbers('batches', _BATCHES.value, int), cli.numbers('clients', _CLIENTS.value, int),
        _SECONDS.value, _OVERLOAD.value, _HOSTILE.value)
    results = serve_load.measure(settings, live_page.samples(())['cat'])
    print(serve_load.table(results), *serve_load.remarks(results), sep='\n')
    if _JSON.value:
        report.write_json(_JSON.value, {'measurement': 'serve', 'engine': settings.engine} | results)


def _print(measurement):
    print(model_tables.metadata(measurement))
    print(*(report.table(*table) for table in model_tables.tables(measurement)), sep='\n\n')
    print(*model_tables.remarks(measurement), sep='\n')


def _gpu_models():
    """Returns the models to measure: those of --models at --image_sizes, or the default ones."""
    if not _MODELS.present:
        return gpu.MODELS
    sizes = [parse_size(text, 'image_sizes') for text in _SIZES.value]
    return [gpu.MeasuredModel(name, size, trained=True) for name in _MODELS.value
            for size in sizes or [models.get_config(name).image_size]]


def compile_for_tpu() -> None:
    """Compiles the steps of the config for a TPU slice; prints and writes the compiler's figures."""
    example = 'tpu --config configs/deit_s.py --topology v5e:16x16'
    config, topology = _config(example).copy_and_resolve_references(), _TOPOLOGY.value
    if topology is None:
        raise ValueError(f'give --topology SLICE, as in: python -m evit_jax.benchmark {example}')
    devices, chip = tpu.devices_of(topology), tpu.chip_of(topology)
    if _BATCH_PER_CHIP.value:
        with config.unlocked():
            config.batch_size = _BATCH_PER_CHIP.value * len(devices) // chip.devices
    mesh = sharding.data_mesh(config.batch_size, devices)
    checks.check(flat(config))
    run = experiment.setup(config, mesh=mesh, sources=_unread_sources(config))
    metadata = {'measurement': 'tpu', 'estimate': 'of the compiler, not measured', 'topology': topology,
                'chips': len(devices) // chip.devices, 'model': config.model.name,
                'parameters': run.model.config.parameters(), 'batch_size': config.batch_size,
                'sharding': config.sharding, 'libtpu': tpu.version()}
    print(', '.join(f'{name} {value}' for name, value in metadata.items()), flush=True)
    plans = [stage.plan for stage in run.stages] if _STAGES.value else [run.plan.in_training()]
    programs = [tpu.compile_step(run, step, plan, topology) for step in _STEPS.value
                for plan in (plans if step == 'train' else [run.plan])]
    distinct = list(dict.fromkeys(program.plan for program in programs))
    print(*(f'plan {number}: {plan}' for number, plan in enumerate(distinct, 1)), sep='\n')
    print(report.table(('', *(f'{program.step}, plan {distinct.index(program.plan) + 1}' for program in programs)),
                       tpu.table_rows(programs, chip)))
    print(*tpu.remarks(programs, chip), sep='\n')
    if _JSON.value:
        report.write_json(_JSON.value, metadata | {'chip': chip._asdict(), 'programs': [
            program._asdict() | {'collectives': {kind: each._asdict() for kind, each in program.collectives.items()}}
            for program in programs]})


def _workloads():
    """Returns the combinations that the flags select.

    Raises:
      ValueError: a flag has a bad value, or PyTorch has no such model.
    """
    selected = workloads.combine(workloads.WorkloadLists(
        names=_MODELS.value, rates=cli.numbers('rates', _RATES.value, float),
        fuse=workloads.parse_choices('--fuse', _FUSE.value, {'true': True, 'false': False}),
        image_sizes=[parse_size(text, 'image_sizes') for text in _SIZES.value],
        batch_sizes=cli.numbers('batches', _BATCHES.value, int),
        dtypes=workloads.parse_choices('--dtypes', _DTYPES.value, {name: name for name in machine.DTYPES}),
        reduce_at=cli.numbers('reduce_at', _REDUCE_AT.value, int), train=_TRAIN.value, reducers=_REDUCERS.value,
        r=cli.numbers('r', _R.value, int), plans=[read_plan_file(file) for file in _PLANS.value],
        gather_impls=workloads.parse_choices('--gather_impls', _GATHER_IMPLS.value,
                                             {'best': '', **{name: name for name in GATHERS}})))
    workloads.parse_choices('--against', _AGAINST.value, dict.fromkeys(model_speed.AGAINST))
    workloads.parse_choices('--precision', _PRECISIONS.value, dict.fromkeys(machine.DTYPES))
    if _PRECISIONS.present and not {*_AGAINST.value} - {'torch'}:
        raise ValueError(f'--precision={",".join(_PRECISIONS.value)} is for engines that run ONNX files: add '
                         '--against=onnxruntime,openvino, or give --dtypes for JAX and PyTorch')
    if 'torch' in _AGAINST.value:
        workloads.check_torch(selected)
    return selected


def _config(example):
    if _CONFIG.value is None:
        raise ValueError(f'give --config FILE, as in: python -m evit_jax.benchmark {example}')
    return _CONFIG.value


def _setup_run(workload, config):
    """Sets up the run of a training workload on one device. No data are read."""
    return experiment.setup(config, mesh=sharding.data_mesh(workload.batch_size, jax.devices()[:1]),
                            sources=_unread_sources(config), model_config=workload.run_config)


def _training_config(workload):
    """Returns the training config, changed to the settings of a workload."""
    config = _config('model --train --config configs/deit_s.py').copy_and_resolve_references()
    with config.unlocked():
        for field in ({field.name for field in dataclasses.fields(workload.config)} & {*config.model}) - {'image_size'}:
            config.model[field] = getattr(workload.config, field)
        config.model.update(models.image_size_keys(workload.image_size))
        config.model.update(name=workload.model, dtype=workload.dtype, gather_impl=workload.gather_impl,
                            reduce_at=workload.reduce_at, fuse=workload.fused)
        config.reducer.update(name=workload.reducer.name, r=workload.r, decreasing=False)
        config.keep.update(rate=workload.rate, rates=(), tokens=workload.tokens, drop=workload.drop, macs=0.0,
                           start_epoch=0, shrink_epochs=0)
        if config.data.eval_crop == initial_model.OF_WEIGHTS:
            config.data.eval_crop = 1.0  # no image is cropped
        config.batch_size = jax.device_count()  # passes the check for all devices; a workload runs on one
        checks.check(flat(config), workload.run_config)
        config.batch_size = workload.batch_size
    return config


def _unread_sources(config):
    """Returns sources with the classes and image size of the config. Their examples are not read."""
    return [GeneratedSource(split, config.model.image_size, config.model.classes or 1000)
            for split in GeneratedSource.splits]


def _training_source(config):
    """Returns the training split of the config, or generated JPEGs, and a description."""
    if config.data.source != 'generated':
        try:
            return inputs.open_sources(flat(config))[0], f'{config.data.source} in {config.data.path}'
        except FileNotFoundError as error:
            print(f'generated images, as the data are missing: {error}')
    source = GeneratedSource('train', config.model.image_size, config.model.classes or 1000, encoded=_JPEG_SIZE)
    return source, 'generated JPEGs of {} x {}'.format(*_JPEG_SIZE)


if __name__ == '__main__':
    cli.run({'input': measure_input, 'model': measure_model, 'serve PATH': measure_serve, 'gpu': measure_gpu,
             'tpu': compile_for_tpu})
