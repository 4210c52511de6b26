"""Measures the costs of a model's parts on this device, or estimates them with the TPU compiler. Times whole plans."""

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
from absl import logging

from evit_jax.benchmarks import cases, timing, tpu
from evit_jax.benchmarks.timing import Benchmark, Times
from evit_jax.benchmarks.workloads import Workload
from evit_jax.data.progress import Progress
from evit_jax.models.config import ViTConfig
from evit_jax.models.costs import mlp_macs
from evit_jax.planning import model_parts
from evit_jax.planning.cost_table import COUNTED_PARTS, DEVICES, CostRequest, CostTable
from evit_jax.planning.model_parts import ModelPart
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime.names import get_by_name

_REPEATS = 4      # repetitions of a small part in one call, to make the overhead of the call negligible
_LARGE = 2e9      # MACs; a part with more is not repeated
_FINE = 128       # every fourth token count up to this one is timed; proportionally fewer for larger models
_STEEP = 1.3      # slope relative to the median slope; an interval with a larger slope may contain a step
_CONCENTRATED = 1.2  # minimum slope of the half that contains the step, relative to the slope of the interval
_TILE = 128       # accelerators pad token counts to multiples of this number


def measure_costs(request: CostRequest, seconds: float = 60.0, rounds: int = 5) -> CostTable:
    """Times the parts of a model if the request is for this device; otherwise estimates them for a TPU.

    The key of the returned table is empty.

    Args:
      seconds, rounds: see `timing.interleave`; not used for estimates.
    """
    chip = get_by_name('device', request.device, DEVICES)
    return _time_parts(request, seconds, rounds) if chip is None else _estimate_parts(request, chip)


def estimate_plan(request: CostRequest, plan: TokenPlan) -> float:
    """Returns the seconds for a batch of the whole model under a plan, by the estimate of the TPU compiler."""
    chip = get_by_name('device', request.device, DEVICES)
    logging.info('compiling the whole program of %s for %s', plan, request.device)
    part = model_parts.whole_model(request.config, request.image_size, _batch_of_device(request, chip), request.dtype,
                                   plan=plan)
    return _estimate(part, chip)


def time_plans(request: CostRequest, plans: Sequence[TokenPlan], seconds: float, rounds: int) -> list[Times]:
    """Times the whole model under each plan, interleaved on this device."""
    cache = cases.ModelCache()
    ready = [cases.inference_case(workload_of(request, plan), cache) for plan in plans]
    return timing.interleave([case.benchmark(rounds) for case in ready], rounds=rounds, seconds=seconds)


def workload_of(request: CostRequest, plan: TokenPlan) -> Workload:
    """Returns the workload of a plan."""
    workload = Workload(request.model, 1.0, plan.fused, request.image_size, request.batch, request.dtype,
                        plan.reductions, reducer=plan.reducer, tokens=plan.tokens, drop=plan.dropped)
    if request.run:
        workload = workload._replace(run=request.run.run, run_config=request.run.config)
    return workload if plan.reductions else workload.dense


def timed_counts(least: int, most: int) -> list[int]:
    """Returns the token counts to time: about every fourth count, the edges of tiles, and both ends."""
    step = 4 * -(-most // _FINE)
    return sorted({least, most, *range(step, most, step), *_tile_edges(most)} - {*range(least)})


def compiled_counts(least: int, most: int) -> list[int]:
    """Returns the initial token counts of an estimate. They are few, because each one needs a compilation."""
    return sorted({least, most, *range(32, most, 32), *_tile_edges(most)})


def refine_steps(cost: Callable[[int], float], counts: Iterable[int]) -> dict[int, float]:
    """Returns the costs at the counts, and at the counts that a bisection of each suspected step visits."""
    costs = {count: cost(count) for count in sorted(counts)}

    def slope(a, b):
        return (costs[b] - costs[a]) / (b - a)

    pairs = list(itertools.pairwise(costs))
    usual = statistics.median(slope(*pair) for pair in pairs)
    for a, b in pairs:
        steepness = _STEEP * usual
        while b - a > 1 and slope(a, b) > steepness:
            steepness, middle = _CONCENTRATED * slope(a, b), (a + b) // 2
            costs[middle] = cost(middle)
            a, b = max((a, middle), (middle, b), key=lambda half: slope(*half))
    return dict(sorted(costs.items()))


def _time_parts(request: CostRequest, seconds: float, rounds: int) -> CostTable:
    config, batch, dtype = request.config, request.batch, request.dtype
    counts = timed_counts(config.num_prefix_tokens + 1, request.max_tokens)
    parts = {('outside', 0): model_parts.whole_model(config, request.image_size, batch, dtype, depth=0),
             ('dense', 0): model_parts.whole_model(config, request.image_size, batch, dtype)}
    for n in counts:
        macs = batch * n * mlp_macs(config)
        repeats = 1 if macs > _LARGE else _REPEATS
        parts |= {(name, n): model_parts.branch(config, name, n, batch, dtype, repeats)
                  for name in model_parts.BRANCHES}
    name, final_part = _final_part(config)
    for n in [*counts[1:-1:4], counts[-1]]:
        parts |= {(reduction_name(reducer), n): model_parts.reduction(config, n, batch, dtype, reducer, request.fuse,
                                                                      _REPEATS) for reducer in request.reducers}
        parts[name, n] = final_part(config, n, batch, dtype, _REPEATS)
    logging.info('the costs of %s in batches of %d, %s, are measured once: %d programs are compiled, then timed',
                 request.model, batch, dtype, len(parts))
    progress, benchmarks = Progress('compiling', len(parts), 'programs'), []
    for (name, n), part in parts.items():
        benchmarks.append(_part_benchmark(f'{name} {n}', part))
        progress.add(1)
    times = timing.interleave(benchmarks, rounds=rounds, seconds=seconds)
    # Use the minimum: disturbances only add time. The many programs leave few turns for each.
    return _table({key: min(taken.turns) / part.repeats for (key, part), taken in zip(parts.items(), times)},
                  request.reducers)


def _part_benchmark(name: str, part: ModelPart) -> Benchmark:
    inputs = [jax.device_put(part.random_arguments(seed), cases.device()) for seed in range(2)]
    program = jax.jit(part.run).lower(*inputs[0]).compile()
    return Benchmark(name, lambda number: program(*inputs[number % 2]), jax.block_until_ready,
                     in_flight=cases.calls_in_flight())


def _estimate_parts(request: CostRequest, chip: tpu.Chip) -> CostTable:
    """Returns the estimated costs on one chip."""
    config, batch, dtype = request.config, _batch_of_device(request, chip), request.dtype

    def refined(name, make_part):
        def cost(n):
            logging.info('compiling %s with %d tokens', name, n)
            return _estimate(make_part(n), chip)

        return {(name, n): cost for n, cost in refine_steps(cost, counts).items()}

    counts = compiled_counts(config.num_prefix_tokens + 1, request.max_tokens)
    outside = model_parts.whole_model(config, request.image_size, batch, dtype, depth=0)
    costs = {('outside', 0): _estimate(outside, chip)}
    for name in model_parts.BRANCHES:
        costs |= refined(name, lambda n, name=name: model_parts.branch(config, name, n, batch, dtype))
    name, final_part = _final_part(config)
    costs |= refined(name, lambda n: final_part(config, n, batch, dtype))
    for n, reducer in itertools.product(counts[1::4], request.reducers):
        costs[reduction_name(reducer), n] = _estimate(
            model_parts.reduction(config, n, batch, dtype, reducer, request.fuse), chip)
    return _table(costs, request.reducers)


def _estimate(part: ModelPart, chip: tpu.Chip) -> float:
    """Returns the seconds of a part on one chip, under the assumption that it takes exactly the estimated cycles."""
    return tpu.cycles_of(part.run, tpu.devices_of(chip.example)[0], part.arguments) / chip.clock


def _batch_of_device(request: CostRequest, chip: tpu.Chip) -> int:
    if request.batch % chip.devices:
        raise ValueError(f'--batch={request.batch}: a chip of {request.device} divides a batch among {chip.devices}: '
                         f'give {request.batch + chip.devices - request.batch % chip.devices}')
    return request.batch // chip.devices


def _tile_edges(most: int) -> list[int]:
    """Returns the counts that fill whole tiles, and these counts plus one."""
    return [edge + more for edge in range(_TILE, most, _TILE) for more in (0, 1)]


def reduction_name(reducer: str) -> str:
    """Returns the name of the part that holds the reduction of a reducer."""
    return f'reduction {reducer}'


def _table(costs: Mapping[tuple[str, int], float], reducers: Sequence[str]) -> CostTable:
    def by_count(part):
        return {n: cost for (name, n), cost in costs.items() if name == part}

    parts = {part: by_count(part) for part in COUNTED_PARTS}
    parts['reduction'] = {reducer: by_count(reduction_name(reducer)) for reducer in reducers}
    return CostTable({}, costs['outside', 0], costs.get(('dense', 0)), **parts)


def _final_part(config: ViTConfig) -> tuple[str, Callable[..., ModelPart]]:
    """Returns the name of the final part in the table, and the function that creates it.

    The final part is the heads if they read patch tokens, otherwise the last block.
    """
    if config.head_reads_patches:
        return 'heads', model_parts.heads
    return 'last_block', model_parts.last_block
