"""Makes a pretrained model faster without training: searches plans on images, then checks and measures them."""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from evit_jax.benchmarks.benchmark_model import BenchmarkModel
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.planning import cost_measurement, cost_table
from evit_jax.planning.blockwise import BlockwiseModel
from evit_jax.planning.calibration import CalibrationImages
from evit_jax.planning.cost_table import THIS_DEVICE, CostRequest
from evit_jax.planning.fidelity import Fidelity
from evit_jax.planning.fidelity_search import METHODS, Found, PlanSearch
from evit_jax.planning.journal import Journal
from evit_jax.planning.plan_costs import PlanCosts
from evit_jax.planning.search import Target
from evit_jax.reduction.plan import TokenPlan, plan_of_macs, plans_of
from evit_jax.reduction.reducers import EVIT, TOME
from evit_jax.reduction.registry import get_reducer

DENSE, SEARCHED = 'dense', 'searched'
_TOLERANCE = 0.1  # largest accepted difference of an estimated time from the target's, relative to the estimate
_BASELINES = {'EViT, constant rate': EVIT, 'ToMe, constant r': TOME}


class Settings(NamedTuple):
    """The settings of a search."""

    targets: tuple[Target, ...]
    reducers: tuple[str, ...] = METHODS  # names of the methods to choose among
    minutes: float = 5.0     # time limit of the search, shared by the targets; costs and the final check come on top
    batch: int = 16          # batch size of the speeds
    device: str = THIS_DEVICE  # a key of `cost_table.DEVICES`
    costs: str | None = None   # file of the costs; None: a file in the cache of the user
    measure: bool = True     # time the plans at the end, if `device` is this one
    seconds: float = 30.0    # time to measure costs, and again to time the plans
    rounds: int = 9          # rounds of the timing
    journal: str = ''        # file for the errors of evaluated plans; '': none


class CheckedPlan(NamedTuple):
    """A plan and its figures.

    The figures are macs, macs_fraction (of dense), tokens (fraction, summed over the blocks), those of
    `Fidelity.figures` on the images of the check, predicted_speed_up if costs of single blocks are known,
    estimated_speed_up if the whole program was compiled for a TPU, and measured_speed_up and
    measured_images_per_second if it was timed.
    """

    plan: TokenPlan
    figures: dict[str, float]
    errors: np.ndarray  # [B] float64, error of each image of the check


class TargetResult(NamedTuple):
    """The plan for one target, beside the dense model and baselines with equal MACs."""

    target: Target
    found: Found
    plans: dict[str, CheckedPlan]  # DENSE, SEARCHED and the baselines, by name


class SearchResult(NamedTuple):
    """The result of `search_plans`."""

    targets: tuple[TargetResult, ...]
    error_name: str           # see `Fidelity.name`
    num_searched: int         # number of images of the search
    num_checked: int          # number of images of the check
    request: CostRequest
    settings: Settings


def search_plans(model: LoadedModel, images: CalibrationImages, check: CalibrationImages,
                 settings: Settings, on_found: Callable[[Target, Found], None] = lambda *_: None) -> SearchResult:
    """Searches a plan for each target on images, then checks all plans on other images.

    Args:
      images: images of the search.
      check: images that the search does not see.
      on_found: called with each plan before the check.

    Raises:
      ValueError: a target cannot be reached, or a reducer is unknown or learned.
    """
    reducers = _reducers(settings.reducers)
    request = _request(model, settings, reducers)
    costs = PlanCosts(request, [target.unit for target in settings.targets], settings.costs, settings.seconds,
                      settings.rounds)
    budgets = [costs.budget(target, reducers[0]) for target in settings.targets]
    blockwise = BlockwiseModel(model, images.images)
    dense = costs.dense
    fidelity = Fidelity.of(model.config, blockwise.outputs(dense), images.labels)
    plan_search = PlanSearch(blockwise, fidelity, journal=Journal(settings.journal, _digest(model, images)))
    found = []
    for target, budget in zip(settings.targets, budgets):
        logging.info('searching a plan for %s on %d images', target, len(images.images))
        found.append(plan_search.find(costs.function(target), budget, reducers, settings.minutes * 60 / len(budgets)))
        on_found(target, found[-1])
    checker = blockwise.for_images(check.images)
    fidelity = Fidelity.of(model.config, checker.outputs(dense), check.labels)
    results = [TargetResult(target, each, _checked(each.plan, costs, checker, fidelity))
               for target, each in zip(settings.targets, found)]
    _warn_of_better_baselines(results)
    results = [_estimated(result, costs) for result in results]
    blockwise.free_programs()
    if settings.device == THIS_DEVICE and settings.measure:
        results = _timed(results, request, settings)
    return SearchResult(tuple(results), fidelity.name, len(images.images), len(check.images), request, settings)


def _reducers(names):
    reducers = [get_reducer(name) for name in names]
    for reducer in reducers:
        if reducer.is_learned:
            raise ValueError(f'reducer {reducer} has learned modules, trained for the blocks that reduce: '
                             f'the search takes reducers without, such as {", ".join(METHODS)}')
    return reducers


def _request(model, settings, reducers):
    own = BenchmarkModel(model.name, model.config, model.image_size, model.dtype, model.budget, model.path)
    names = tuple(dict.fromkeys([EVIT.name, TOME.name, *(reducer.name for reducer in reducers)]))
    return CostRequest(model.name, model.image_size, settings.batch, model.dtype, settings.device,
                       own.fuse, own, names)


def _digest(model: LoadedModel, images: CalibrationImages) -> str:
    """Returns a digest of all that decides the errors of a plan: weights, preprocessing, images and code version."""
    settings = (model.config, model.image_size, model.mean, model.std, model.dtype, cost_table.source_digest())
    digest = hashlib.sha256(repr(settings).encode())
    for array in (images.images, *jax.tree.leaves(model.params)):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def _checked(plan, costs, checker, fidelity) -> dict[str, CheckedPlan]:
    """Returns the figures of a plan, the dense model, and baselines with the MACs of the plan."""
    macs, dense = costs.config.macs, costs.dense
    plans = {DENSE: dense, SEARCHED: plan}
    for name, reducer in _BASELINES.items():
        family = plans_of(reducer, dense.patches, len(dense.keep), reduce_at=costs.config.default_reduce_at)
        plans[name] = plan_of_macs(macs, max(macs(plan), macs(family(1.0))) / macs(dense), family)
    return {name: _check(each, costs, checker, fidelity) for name, each in plans.items()}


def _warn_of_better_baselines(results):
    for target, _, plans in results:
        error = {name: checked.figures['error'] for name, checked in plans.items() if name != DENSE}
        best = min(error, key=error.get)
        if error[best] < error[SEARCHED]:
            logging.warning('%s: the error of the searched plan is %.3g, and that of %s with equal MACs is %.3g: give '
                            'the search more minutes, or more images', target, error[SEARCHED], best, error[best])


def _check(plan, costs, checker, fidelity) -> CheckedPlan:
    macs, dense, outputs = costs.config.macs, costs.dense, checker.outputs(plan)
    figures = {'macs': macs(plan), 'macs_fraction': macs(plan) / macs(dense),
               'tokens': sum(plan.counts) / sum(dense.counts)} | fidelity.figures(outputs)
    if (seconds := costs.seconds(plan)) is not None:
        figures['predicted_speed_up'] = costs.seconds(dense) / seconds
    return CheckedPlan(plan, figures, fidelity.errors(outputs))


def _estimated(result: TargetResult, costs: PlanCosts) -> TargetResult:
    """Adds the estimated speed of the whole program to the searched plan, if the target is a speed on a TPU."""
    if not costs.is_estimated(result.target):
        return result
    checked = result.plans[SEARCHED]
    seconds = costs.whole_seconds(checked.plan)
    if abs(costs.seconds_for(result.target) / seconds - 1) > _TOLERANCE:
        logging.warning('%s: the whole program of the searched plan takes %.3g ms by the estimate of the compiler, and '
                        'the target allows %.3g ms: search again for another target', result.target, 1e3 * seconds,
                        1e3 * costs.seconds_for(result.target))
    figures = checked.figures | {'estimated_speed_up': costs.whole_seconds(costs.dense) / seconds}
    return result._replace(plans=result.plans | {SEARCHED: checked._replace(figures=figures)})


def _timed(results, request, settings):
    """Adds measured speeds to all plans. They are timed in turns, with the dense model among them."""
    plans = {checked.plan for result in results for checked in result.plans.values()}
    ordered = sorted(plans, key=lambda plan: (bool(plan.reductions), str(plan)))  # the dense plan is first
    logging.info('timing %d plans in batches of %d', len(ordered), request.batch)
    times = cost_measurement.time_plans(request, ordered, settings.seconds, settings.rounds)
    measured = {plan: {'measured_images_per_second': request.batch / each.median,
                       'measured_speed_up': each.faster_than(times[0])} for plan, each in zip(ordered, times)}
    return [result._replace(plans={name: each._replace(figures=each.figures | measured[each.plan])
                                   for name, each in result.plans.items()}) for result in results]
