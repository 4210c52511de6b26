"""Costs of token plans in a search: multiply-accumulates, seconds of single blocks, and estimates of whole programs."""

from collections.abc import Callable, Sequence

from absl import logging

from evit_jax.planning import cost_measurement, cost_table, search
from evit_jax.planning.cost_table import THIS_DEVICE, CostRequest
from evit_jax.planning.search import Target
from evit_jax.reduction.plan import TokenPlan, make_plan, plan_of_macs, plans_of
from evit_jax.reduction.reducer import Reducer
from evit_jax.reduction.reducers import EVIT

_CLOSE = 0.03  # relative difference of a whole program from the target that needs no further correction
_CORRECTIONS = 3  # number of whole programs that are compiled to correct a budget


class PlanCosts:
    """The costs of plans: multiply-accumulates (MACs), and seconds if a target needs them."""

    def __init__(self, request: CostRequest, units: Sequence[str], path: str | None, seconds: float, rounds: int):
        """Measures or estimates the costs of the model's parts, if a target needs them.

        Args:
          units: the units of the targets.
          path: file of the costs; None: a file in the cache of the user.
          seconds, rounds: see `cost_measurement.measure_costs`.
        """
        self._request, self.config = request, request.config
        self.dense = make_plan(request.patches, self.config.depth, reduce_at=())
        self._table = None
        if any(not unit.endswith('MACs') for unit in units):
            self._table = cost_table.load_or_measure(
                request, lambda request: cost_measurement.measure_costs(request, seconds, rounds), path)
        self._by_reducer, self._whole = {}, {}

    def function(self, target: Target) -> Callable[[TokenPlan], float]:
        """Returns the cost that a target limits: MACs per image, or seconds per batch."""
        return self.config.macs if target.unit.endswith('MACs') else self.seconds

    def seconds(self, plan: TokenPlan) -> float | None:
        """Returns the predicted seconds for a batch, as the sum over the blocks.

        None if costs were not measured, or not for this reducer.
        """
        name = plan.reducer.name if plan.reductions else EVIT.name
        if self._table is None or name not in self._table.reduction:
            return None
        if name not in self._by_reducer:
            self._by_reducer[name] = self._table.costs(self._request.max_tokens, self.config.num_prefix_tokens, name)
        return self._by_reducer[name].total(plan)

    def is_estimated(self, target: Target) -> bool:
        """Returns True if the target is a speed on a TPU, which is estimated and not measured."""
        return self._request.device != THIS_DEVICE and not target.unit.endswith('MACs')

    def whole_seconds(self, plan: TokenPlan) -> float:
        """Returns the seconds for a batch by the compiler's estimate of the whole program, for a TPU."""
        if plan not in self._whole:
            self._whole[plan] = cost_measurement.estimate_plan(self._request, plan)
        return self._whole[plan]

    def seconds_for(self, target: Target) -> float:
        """Returns the estimated seconds for a batch that a target allows the whole program, for a TPU."""
        return self._limit(target, self.whole_seconds(self.dense))

    def budget(self, target: Target, reducer: Reducer) -> float:
        """Returns the largest cost that meets a target, in the unit of `function`.

        The time of a whole program is not the sum over its blocks: compilers choose other layouts. On a TPU, the budget
        is corrected with the estimates of whole programs, for plans of the reducer with equal numbers in all blocks.
        """
        if not self.is_estimated(target):
            return self._limit(target, self.seconds(self.dense) or 0.0)
        limit, dense = self.seconds_for(target), self.seconds(self.dense)
        family = plans_of(reducer, self.dense.patches, self.config.depth)
        budget, best = dense * limit / self.whole_seconds(self.dense), None
        for _ in range(_CORRECTIONS):
            plan = _plan_within(self.seconds, budget / dense, family)
            budget, whole = self.seconds(plan), self.whole_seconds(plan)
            logging.info('%s: the blocks of %s take %.3g ms and the whole program %.3g ms; the target allows %.3g ms '
                         '(estimates)', target, plan, 1e3 * budget, 1e3 * whole, 1e3 * limit)
            best = min(best or (whole, budget), (whole, budget), key=lambda pair: abs(pair[0] / limit - 1))
            if abs(whole / limit - 1) < _CLOSE:
                break
            budget *= limit / whole
        return best[1] * limit / best[0]

    def _limit(self, target, dense_seconds):
        return search.budget_for(target, dense_seconds=dense_seconds, dense_macs=self.config.macs(self.dense),
                                 batch=self._request.batch)


def _plan_within(seconds, fraction, family) -> TokenPlan:
    """Returns the plan of a family with about this fraction of the dense seconds, or the fastest one."""
    try:
        return plan_of_macs(seconds, min(fraction, 1), family)
    except ValueError:
        return family(1.0)
