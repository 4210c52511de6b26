"""Plans for a speed: python -m evit_jax.plan --model deit_s --image_size 224 --target 2x --device this --out plan.json
                      python -m evit_jax.plan --model runs/digits --target 1.5x --out fast.json

--model takes a name, or the folder of a run or of converted weights. A run is planned with its own model config, image
size, blocks, fusion and dtype, and its plan is measured with its own reducer and weights.

For who wants a model twice as fast (2x), 20000img/s or 3.0GMACs, and no keep rate. What a block costs by its tokens is
measured on this device (once: it is kept), or with --device=tpu_v5e and its like estimated by the TPU compiler, without
a TPU. Of all plans within the target, with keep rates that do not rise from block to block, it takes the one that keeps
the most tokens, summed over the blocks, and sets it beside the plain keep rate of as many multiply-accumulates; on this
device it then measures both. What --out writes is taken by --plan of main, predict, export and benchmark model.
"""

from typing import Any

from absl import flags, logging

from evit_jax import cli
from evit_jax.benchmarks import report
from evit_jax.benchmarks.measured import MeasuredModel, find_model
from evit_jax.planning import costs, search
from evit_jax.planning.costs import DEVICES, THIS, Asked
from evit_jax.planning.search import Costs, Target
from evit_jax.reduction.plan import TokenPlan, make_plan, plan_of_macs, plans_of
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.reduction.reducers import EVIT
from evit_jax.runtime import backend, machine
from evit_jax.runtime.names import get_by_name

_MODEL = flags.DEFINE_string('model', None, 'Name of the model, or folder of a run or of converted weights.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', None, "Of the images; the model's own if not given.")
flags.DEFINE_alias('image-size', 'image_size')
_TARGET = flags.DEFINE_string('target', None, 'How fast: 2x, 20000img/s, 3.0GMACs, 18MMACs.')
_DEVICE = flags.DEFINE_string('device', THIS, f'On what: {", ".join(DEVICES)}.')
_BATCH = flags.DEFINE_integer('batch', 16, 'Images at a time.', lower_bound=1)
_DTYPE = flags.DEFINE_enum('dtype', None, [*machine.DTYPES], 'Dtype of the computation; if not given, as the run was '
                           'trained, and float32 for a named model.')
_FUSE = flags.DEFINE_bool('fuse', None, 'Dropped tokens become one; if not given, as the run was trained, and true for '
                          'a named model.')
_REDUCTIONS = flags.DEFINE_integer('reductions', 3, 'At most.', lower_bound=1, upper_bound=6)
_BLOCKS = flags.DEFINE_list('blocks', [], 'Blocks that may drop tokens; if not given, those of the run, and for a '
                            'named model those from a quarter of it on: before, class attention says little.')
_LEAST_RATE = flags.DEFINE_float('least_rate', 0.5, 'Share of the tokens that every reduction keeps at least.',
                                 lower_bound=0.01, upper_bound=1)
_COSTS = flags.DEFINE_string('costs', None, 'File that the costs are kept in; if not given, one in the cache of the '
                             'user.')
_OUT = flags.DEFINE_string('out', None, 'File that the plan is written to.')
_MEASURE = flags.DEFINE_bool('measure', True, 'On this device: measure dense, plain rate and plan in the end.')
_ROUNDS = flags.DEFINE_integer('rounds', 9, 'Of measuring.', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 30.0, 'Time to measure the plans, about; and the costs.', lower_bound=0.01)


def main() -> None:
    """Prints the plan, what it is predicted to do and what it does, and writes it."""
    if not _MODEL.value or not _TARGET.value:
        raise ValueError('give both --model NAME and --target SPEED, as in: python -m evit_jax.plan --model=deit_s '
                         '--target=2x')
    target = search.read_target(_TARGET.value)
    if _DEVICE.value == THIS:
        backend.start()
    asked = _asked()
    report.check_writable('--out', _OUT.value)
    blocks = cli.numbers('blocks', _BLOCKS.value, int) or _own_blocks(asked) or range(
        asked.config.default_reduce_at[0], asked.config.depth)
    dense = make_plan(asked.patches, asked.config.depth, reduce_at=blocks)  # refuses blocks that there are not
    table = costs.find(asked, lambda asked: costs.make(asked, _SECONDS.value, _ROUNDS.value), _COSTS.value)
    prices = table.costs(asked.most, asked.config.num_prefix_tokens)
    plan = _find(target, asked, prices, dense, blocks)
    plans = {'dense': dense, 'plain rate': _plain(asked, plan, dense), 'plan': plan}
    rows = {name: _predicted(asked, prices, one, dense) for name, one in plans.items()}
    print(f'{_called(asked)}, {asked.image_size} px, batch {asked.batch}, {asked.dtype}, {_where(asked)}: {target}')
    print(*(f'{name}: {one}' for name, one in plans.items()), _counting(prices), sep='\n', flush=True)
    if asked.device == THIS and _MEASURE.value:
        _measure(asked, plans, rows)
    print(report.table(*_cells(rows)))
    if _OUT.value:
        report.write_json(_OUT.value, PlanFile.of(plan, asked.model, asked.image_size).metadata() | {
            'target': str(target), 'run': asked.run and asked.run.run, 'asked': asked.metadata(), 'speeds': rows})


def _asked() -> Asked:
    get_by_name('device', _DEVICE.value, DEVICES)
    model = find_model('--model', _MODEL.value)
    size = _IMAGE_SIZE.value or model.image_size
    model.config.patches(size)  # refuses one that does not fit
    _check_reducer(model)
    fuse = model.fuse if _FUSE.value is None else _FUSE.value and model.budget.reducer.can_fuse
    return Asked(model.name, size, _BATCH.value, _DTYPE.value or model.dtype, _DEVICE.value, fuse,
                 model if model.run else None)


def _check_reducer(model: MeasuredModel) -> None:
    """Raises a ValueError where plans of the search cannot be those of the run's reducer."""
    reducer = model.budget.reducer
    if reducer.is_learned:
        raise ValueError(f'--model={model.run} reduces by {reducer}, whose learned modules were trained at the blocks '
                         f'{model.blocks}, and the search chooses among blocks: measure keep rates instead, by '
                         f'python -m evit_jax.benchmark model --models={model.run}')
    if reducer.merges:
        if _LEAST_RATE.value < 0.5 and reducer.min_kept(100) > 1:
            raise ValueError(f'--least_rate={_LEAST_RATE.value:g}: {model.run} reduces by {reducer}, which keeps at '
                             'least half of the tokens: give 0.5 or more')
        logging.warning('%s reduces by %s, and the search takes the cost of a reduction from EViT: compare the '
                        'predicted speed with the measured one', model.run, reducer)


def _own_blocks(asked: Asked) -> tuple[int, ...]:
    return asked.run.blocks if asked.run else ()


def _called(asked: Asked) -> str:
    return f'{asked.run.run} ({asked.model})' if asked.run else asked.model


def _find(target: Target, asked: Asked, prices: Costs, dense: TokenPlan, blocks) -> TokenPlan:
    """The plan for the target.

    Raises:
      ValueError: there is none; names the fastest.
    """
    config, macs = asked.config, asked.config.macs(dense)
    sizes = {'patches': asked.patches, 'depth': config.depth}
    if target.unit.endswith('MACs'):
        head = config.has_token_head * config.width * config.classes
        searched = search.mac_costs(macs, width=config.width, mlp_ratio=config.mlp_ratio, head=head,
                                    prefix=config.num_prefix_tokens, **sizes)
    else:
        searched = prices
    budget = search.budget_of(target, dense_seconds=prices.of(dense), dense_macs=macs, batch=asked.batch)
    how = sizes | {'blocks': blocks, 'reductions': _REDUCTIONS.value, 'least_rate': _LEAST_RATE.value,
                   'fuse': asked.fuse}
    if plan := search.most_tokens(searched, budget=budget, **how):
        return plan
    least = search.cheapest(searched, **how)
    found = _predicted(asked, prices, least, dense)
    raise ValueError(
        f'--target={target} cannot be reached by dropping tokens at {_REDUCTIONS.value} of the blocks '
        f'{_shown(blocks)}: the fastest plan, {least}, has {found["speed_up"]:.2f}x, '
        f'{found["images_per_second"]:,.1f}img/s, {found["macs"] / 1e9:.3g}GMACs: ask for less, or give '
        'earlier --blocks, a lower --least_rate or more --reductions')


def _shown(blocks) -> str:
    blocks = sorted(blocks)
    whole = len(blocks) == blocks[-1] - blocks[0] + 1
    return f'{blocks[0]} to {blocks[-1]}' if whole else ', '.join(map(str, blocks))


def _plain(asked: Asked, plan: TokenPlan, dense: TokenPlan) -> TokenPlan:
    """One keep rate at the usual blocks with as many multiply-accumulates, or as near as it can come."""
    macs = asked.config.macs
    reducer = asked.run.budget.reducer if asked.run else EVIT
    reduce_at = _own_blocks(asked) or asked.config.default_reduce_at
    family = plans_of(reducer, asked.patches, asked.config.depth, reduce_at=reduce_at, fuse=asked.fuse)
    return plan_of_macs(macs, max(macs(plan), macs(family(1.0))) / macs(dense), family)


def _predicted(asked: Asked, prices: Costs, plan: TokenPlan, dense: TokenPlan) -> dict[str, Any]:
    seconds = prices.of(plan)
    return {'macs': asked.config.macs(plan), 'tokens': sum(plan.counts) / sum(dense.counts),
            'images_per_second': asked.batch / seconds, 'speed_up': prices.of(dense) / seconds}


def _counting(prices: Costs) -> str:
    """Which tokens the counts of a plan are, and where the cost of a block leaps."""
    of = prices.block.whole.tolist()
    leaps = [f'a block with {high} tokens costs {of[high] / of[low] - 1:.0%} more than with {low}'
             for low, high in search.cliffs(dict(enumerate(of)))]
    return 'counts are without the class token' + (f'; with it, {", ".join(leaps)}' if leaps else '')


def _measure(asked: Asked, plans: dict[str, TokenPlan], rows: dict[str, dict]) -> None:
    """Adds to the rows what is measured."""
    measured = costs.side_by_side(asked, list(plans.values()), _SECONDS.value, _ROUNDS.value)
    for row, times in zip(rows.values(), measured, strict=True):
        row |= {'measured_images_per_second': asked.batch / times.median,
                'measured_speed_up': times.faster_than(measured[0])}


def _cells(rows: dict[str, dict]) -> tuple[tuple, list]:
    said = {'macs': ('G MACs', lambda value: f'{value / 1e9:.3g}'), 'tokens': ('tokens', '{:.1%}'.format),
            'images_per_second': ('predicted images/s', '{:,.1f}'.format), 'speed_up': ('x', '{:.2f}'.format),
            'measured_images_per_second': ('measured images/s', '{:,.1f}'.format),
            'measured_speed_up': ('x', '{:.2f}'.format)}
    shown = [key for key in said if key in rows['dense']]
    return ('', *(said[key][0] for key in shown)), [
        (name, *(said[key][1](row[key]) for key in shown)) for name, row in rows.items()]


def _where(asked: Asked) -> str:
    if asked.device == THIS:
        return 'on this device'
    return f'one {asked.device}, estimated by the compiler and not measured, ranking and gathering left out'


if __name__ == '__main__':
    cli.run(main)
