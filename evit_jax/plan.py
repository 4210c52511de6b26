"""Searches plans: python -m evit_jax.plan --model weights/dinov2_s --data photos/ --target 2x --out fast.json
                python -m evit_jax.plan --model deit_s --target 2x --device tpu_v5e --out plan.json

Finds the token plan for a target: twice as fast as the dense model (2x), 20000img/s, half of the MACs (0.5MACs), or
3.0GMACs.

With --data, the plan is searched on your own images; they need no labels. Each candidate plan runs on them, and the
search compares its outputs with those of the dense model. It chooses the reducer, and the tokens that each block drops
or merges. The result is checked on images that the search has not seen, and compared with EViT and ToMe at equal MACs.
No training is needed. --targets 1.5x,2x,3x gives a plan for each target, and --report an HTML page with pictures.
Ctrl-C ends the search for a target early, with the best plan so far.

Without --data, the search assumes EViT, or the reducer of the run, and knows no images: among the plans that meet the
target, it takes the one that keeps the most tokens, summed over the blocks. Use it for a model that you will train. It
considers plans whose keep rates do not rise from block to block.

--model takes the name of a model, a run, a file or folder of weights (.pth, .safetensors, Hugging Face, timm), or
hf-hub:ORG/NAME. For a run, the search uses the run's own model config, image size, blocks, fusion and dtype.

For a speed, the cost of a block for each number of tokens is measured on this device and stored in a file. With a TPU
as --device, such as tpu_v5e, the TPU compiler estimates the costs; no TPU is needed. Pass the file of --out to --plan
of main, predict, export and benchmark model.
"""

import shlex
import sys
from typing import Any

from absl import flags

from evit_jax import cli, models
from evit_jax.benchmarks import report
from evit_jax.benchmarks.benchmark_model import BenchmarkModel, find_model
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.inference.images import find_images
from evit_jax.interchange.opening import open_model
from evit_jax.models.config import ImageSize, parse_size, size_text
from evit_jax.models.costs import head_macs, mlp_macs
from evit_jax.planning import cost_measurement, cost_table, image_search, search
from evit_jax.planning.cost_table import DEVICES, THIS_DEVICE, CostRequest
from evit_jax.planning.fidelity_search import METHODS
from evit_jax.planning.search import Costs, Target
from evit_jax.planning.speed_up import Settings
from evit_jax.reduction.plan import TokenPlan, make_plan, plan_of_macs, plans_of
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import EVIT
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import backend, machine, storage
from evit_jax.runtime.names import get_by_name

_MODEL = flags.DEFINE_string('model', None, 'Name of a model, a run, a file or folder of weights, or hf-hub:ORG/NAME.')
_IMAGE_SIZE = flags.DEFINE_string('image_size', None, 'Side of the images, or HEIGHTxWIDTH, in pixels. Defaults to the '
                                  'image size of the model.')
flags.DEFINE_alias('image-size', 'image_size')
_TARGETS = flags.DEFINE_list('target', [], 'Target: 2x (as fast as dense), 20000img/s, 0.5MACs (of the dense model), '
                             '3.0GMACs, 18MMACs. With --data, several targets with commas between.')
flags.DEFINE_alias('targets', 'target')
_DATA = flags.DEFINE_multi_string('data', [], 'Images to search the plan on: a folder, a pattern or a file; may be '
                                  'repeated. They need no labels.')
_CHECK_DATA = flags.DEFINE_multi_string('check_data', [], 'With --data: images to check the plan on. Defaults to '
                                        'images of --data that the search does not use.')
_IMAGES = flags.DEFINE_integer('images', 64, 'With --data: number of images of the search, drawn at random.',
                               lower_bound=2)
_CHECK_IMAGES = flags.DEFINE_integer('check_images', 128, 'With --data: number of images of the check.', lower_bound=1)
_REDUCERS = flags.DEFINE_list('reducers', [*METHODS], 'With --data: reducers to choose among; NAME:IMPORTANCE sets the '
                              'importance.')
_MINUTES = flags.DEFINE_float('minutes', 5.0, 'With --data: time limit of the search, shared by the targets. Measuring '
                              'costs and checking the plans come on top.', lower_bound=0.01)
_SEED = flags.DEFINE_integer('seed', 0, 'With --data: seed of the draw of images.', lower_bound=0)
_REPORT = flags.DEFINE_string('report', None, 'With --data: HTML file to write, with curves and pictures.')
_DEVICE = flags.DEFINE_string('device', THIS_DEVICE, f'Device to plan for: {", ".join(DEVICES)}.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Batch size.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', None, [*machine.DTYPES], 'Dtype of the computation. Defaults to the dtype of the '
                           'run, and to float32 for a named model.')
_FUSE = flags.DEFINE_bool('fuse', None, 'Fuse dropped tokens into one. Defaults to the setting of the run, and to true '
                          'for a named model.')
_REDUCTIONS = flags.DEFINE_integer('reductions', 3, 'Maximum number of reductions.', lower_bound=1, upper_bound=6)
_BLOCKS = flags.DEFINE_list('blocks', [], 'Blocks that may reduce tokens. Defaults to the blocks of the run; for a '
                            'named model, to all blocks except the first quarter, where class attention is not '
                            'informative.')
_LEAST_RATE = flags.DEFINE_float('least_rate', 0.5, 'Minimum keep rate of each reduction.',
                                 lower_bound=0.01, upper_bound=1)
_COSTS = flags.DEFINE_string('costs', None, 'File that stores the costs. Defaults to a file in the cache of the user.')
_OUT = flags.DEFINE_string('out', None, 'File to write the plan to.')
_MEASURE = flags.DEFINE_bool('measure', True, 'Time the dense model, the constant rate and the plan at the end; only '
                             'with --device=this.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Number of rounds of each measurement.', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Approximate time to measure the costs; measuring the plans takes as '
                              'long.', lower_bound=0.01)


def main() -> None:
    """Searches the plan; prints and writes it, with its predicted and measured speed."""
    if not _MODEL.value or not _TARGETS.value:
        raise ValueError('give both --model NAME and --target SPEED, as in: python -m evit_jax.plan --model=deit_s '
                         '--target=2x')
    targets = list(dict.fromkeys(search.parse_target(text) for text in _TARGETS.value))
    get_by_name('device', _DEVICE.value, DEVICES)
    if _DEVICE.value == THIS_DEVICE or _DATA.value:
        backend.start()
    if _DATA.value:
        _search_on_images(targets)
    elif len(targets) > 1:
        raise ValueError(f'--target={",".join(_TARGETS.value)} are {len(targets)} targets: give one, or images in '
                         '--data')
    else:
        _search_by_counts(targets[0])


def _search_on_images(targets: list[Target]) -> None:
    """Searches plans by their effect on the outputs for the images of --data."""
    settings = Settings(
        tuple(targets), tuple(_REDUCERS.value), _MINUTES.value, _BATCH.value, _DEVICE.value, _COSTS.value,
        _MEASURE.value, _SECONDS.value, _ROUNDS.value)
    files = image_search.Files(find_images(_DATA.value), find_images(_CHECK_DATA.value), _IMAGES.value,
                               _CHECK_IMAGES.value, _SEED.value)
    command = shlex.join(['python', '-m', 'evit_jax.plan', *sys.argv[1:]])
    outputs = image_search.OutputFiles.of(_OUT.value, _REPORT.value, targets, command)
    if _MODEL.value in models.CONFIGS and not storage.as_path(_MODEL.value).exists():
        raise ValueError(f'--model={_MODEL.value} has no weights, and --data searches by the outputs of a trained model'
                         ': give a run, a file or folder of weights, or hf-hub:ORG/NAME')
    model = open_model(_MODEL.value)
    model = model._replace(image_size=_image_size(model), dtype=_DTYPE.value or model.dtype)
    print(image_search.summary(model, image_search.run(model, files, settings, outputs)), flush=True)


def _search_by_counts(target: Target) -> None:
    """Searches the plan that keeps the most tokens."""
    request = _request()
    report.check_writable('--out', _OUT.value)
    blocks = cli.numbers('blocks', _BLOCKS.value, int) or _trained_blocks(request) or range(
        request.config.default_reduce_at[0], request.config.depth)
    dense = make_plan(request.patches, request.config.depth, reduce_at=blocks)  # a block out of range is an error
    table = cost_table.load_or_measure(
        request, lambda request: cost_measurement.measure_costs(request, _SECONDS.value, _ROUNDS.value), _COSTS.value)
    costs = table.costs(request.max_tokens, request.config.num_prefix_tokens, request.reducers[0])
    plan = _find_plan(target, request, costs, dense, blocks)
    plans = {'dense': dense, 'constant rate': _constant_rate(request, plan, dense), 'plan': plan}
    rows = {name: _predicted(request, costs, each, dense) for name, each in plans.items()}
    print(f'{_title(request)}, {size_text(request.image_size)} px, batch {request.batch}, {request.dtype}, '
          f'{_device_description(request)}: {target}')
    print(*(f'{name}: {each}' for name, each in plans.items()), _count_remark(costs), sep='\n', flush=True)
    if request.device == THIS_DEVICE and _MEASURE.value:
        _add_measured(request, plans, rows)
    print(report.table(*_table(rows)))
    if _OUT.value:
        report.write_json(_OUT.value, PlanFile.of(plan, request.model, request.image_size).metadata() | {
            'target': str(target), 'run': request.run and request.run.run, 'request': request.metadata(),
            'speeds': rows})


def _request() -> CostRequest:
    """Returns the cost request for the flags.

    Raises:
      ValueError: a flag has a bad value, or the search cannot plan for the reducer of the run.
    """
    model = find_model('--model', _MODEL.value)
    image_size = _image_size(model)
    _check_reducer(model)
    fuse = model.fuse if _FUSE.value is None else _FUSE.value and model.budget.reducer.can_fuse
    return CostRequest(model.name, image_size, _BATCH.value, _DTYPE.value or model.dtype, _DEVICE.value, fuse,
                       model if model.run else None, (model.budget.reducer.name,))


def _image_size(model: BenchmarkModel | LoadedModel) -> ImageSize:
    """Returns the image size of the flag, or of the model if the flag is not set.

    Raises:
      ValueError: the flag is not a size, or its sides are not multiples of the patch size.
    """
    image_size = parse_size(_IMAGE_SIZE.value, 'image_size') if _IMAGE_SIZE.value else model.image_size
    model.config.patches(image_size)
    return image_size


def _check_reducer(model: BenchmarkModel) -> None:
    """Raises a ValueError if the reducer of the run does not support the plans of the search."""
    reducer = model.budget.reducer
    if reducer.is_learned:
        raise ValueError(f'--model={model.run} reduces by {reducer}, whose learned modules were trained at the blocks '
                         f'{model.blocks}, and the search chooses among blocks: measure keep rates instead, by '
                         f'python -m evit_jax.benchmark model --models={model.run}')
    if reducer.merges and _LEAST_RATE.value < 0.5 and reducer.min_kept(100) > 1:
        raise ValueError(f'--least_rate={_LEAST_RATE.value:g}: {model.run} reduces by {reducer}, which keeps at '
                         'least half of the tokens: give 0.5 or more')


def _trained_blocks(request: CostRequest) -> tuple[int, ...]:
    return request.run.blocks if request.run else ()


def _title(request: CostRequest) -> str:
    return f'{request.run.run} ({request.model})' if request.run else request.model


def _find_plan(target: Target, request: CostRequest, costs: Costs, dense: TokenPlan, blocks) -> TokenPlan:
    """Returns the plan for the target.

    Raises:
      ValueError: no plan reaches the target. The message names the fastest plan.
    """
    config, macs = request.config, request.config.macs(dense)
    sizes = {'patches': request.patches, 'depth': config.depth}
    searched = costs
    if target.unit.endswith('MACs'):
        searched = search.mac_costs(macs, width=config.width, mlp=mlp_macs(config), head=head_macs(config),
                                    prefix=config.num_prefix_tokens, **sizes)
    budget = search.budget_for(target, dense_seconds=costs.total(dense), dense_macs=macs, batch=request.batch)
    options = sizes | {'blocks': blocks, 'reductions': _REDUCTIONS.value, 'least_rate': _LEAST_RATE.value,
                       'fuse': request.fuse}
    if plan := search.find_plan(searched, budget=budget, **options):
        return plan._replace(reducer=get_reducer(request.reducers[0]))
    fastest = search.cheapest_plan(searched, **options)
    speed = _predicted(request, costs, fastest, dense)
    raise ValueError(
        f'--target={target} cannot be reached by dropping tokens at {_REDUCTIONS.value} of the blocks '
        f'{_range_text(blocks)}: the fastest plan, {fastest}, has {speed["speed_up"]:.2f}x, '
        f'{speed["images_per_second"]:,.1f}img/s, {speed["macs"] / 1e9:.3g}GMACs: lower the target, or give '
        'earlier --blocks, a lower --least_rate or more --reductions')


def _range_text(blocks) -> str:
    blocks = sorted(blocks)
    contiguous = len(blocks) == blocks[-1] - blocks[0] + 1
    return f'{blocks[0]} to {blocks[-1]}' if contiguous else ', '.join(map(str, blocks))


def _constant_rate(request: CostRequest, plan: TokenPlan, dense: TokenPlan) -> TokenPlan:
    """Returns the plan with a constant keep rate, at the default blocks, whose MACs are closest to those of a plan."""
    macs = request.config.macs
    reducer = request.run.budget.reducer if request.run else EVIT
    reduce_at = _trained_blocks(request) or request.config.default_reduce_at
    family = plans_of(reducer, request.patches, request.config.depth, reduce_at=reduce_at, fuse=request.fuse)
    return plan_of_macs(macs, max(macs(plan), macs(family(1.0))) / macs(dense), family)


def _predicted(request: CostRequest, costs: Costs, plan: TokenPlan, dense: TokenPlan) -> dict[str, Any]:
    seconds = costs.total(plan)
    return {'macs': request.config.macs(plan), 'tokens': sum(plan.counts) / sum(dense.counts),
            'images_per_second': request.batch / seconds, 'speed_up': costs.total(dense) / seconds}


def _count_remark(costs: Costs) -> str:
    """Returns a line that explains the token counts, and lists the counts at which the cost of a block jumps."""
    total = costs.block.total.tolist()
    jumps = [f'a block with {high} tokens costs {total[high] / total[low] - 1:.0%} more than with {low}'
             for low, high in search.steps(dict(enumerate(total)))]
    return 'counts are without the class token' + (f'; with it, {", ".join(jumps)}' if jumps else '')


def _add_measured(request: CostRequest, plans: dict[str, TokenPlan], rows: dict[str, dict]) -> None:
    """Measures the plans and adds their speeds to the rows."""
    measured = cost_measurement.time_plans(request, list(plans.values()), _SECONDS.value, _ROUNDS.value)
    for row, times in zip(rows.values(), measured, strict=True):
        row |= {'measured_images_per_second': request.batch / times.median,
                'measured_speed_up': times.faster_than(measured[0])}


def _table(rows: dict[str, dict]) -> tuple[tuple, list]:
    columns = {'macs': ('G MACs', lambda value: f'{value / 1e9:.3g}'), 'tokens': ('tokens', '{:.1%}'.format),
               'images_per_second': ('predicted images/s', '{:,.1f}'.format), 'speed_up': ('x', '{:.2f}'.format),
               'measured_images_per_second': ('measured images/s', '{:,.1f}'.format),
               'measured_speed_up': ('x', '{:.2f}'.format)}
    present = [key for key in columns if key in rows['dense']]
    return ('', *(columns[key][0] for key in present)), [
        (name, *(columns[key][1](row[key]) for key in present)) for name, row in rows.items()]


def _device_description(request: CostRequest) -> str:
    if request.device == THIS_DEVICE:
        return 'on this device'
    return f'one {request.device}, estimated by the compiler and not measured, without ranking and gathering'


if __name__ == '__main__':
    cli.run(main)
