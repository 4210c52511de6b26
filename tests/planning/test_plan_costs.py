"""PlanCosts: budgets of targets, corrected with estimates of whole programs."""

import dataclasses
import itertools

import pytest

import evit_jax
from evit_jax.benchmarks.benchmark_model import BenchmarkModel
from evit_jax.planning import cost_measurement, cost_table
from evit_jax.planning.calibration import CalibrationImages
from evit_jax.planning.cost_table import CostRequest, CostTable
from evit_jax.planning.plan_costs import PlanCosts, _plan_within
from evit_jax.planning.search import parse_target
from evit_jax.planning.speed_up import SEARCHED, Settings, search_plans
from evit_jax.reduction.plan import plans_of
from evit_jax.reduction.registry import get_reducer
from tests.helpers import tiny

WARD = get_reducer('ward')
CONFIG = dataclasses.replace(tiny.CONFIG, image_size=32, depth=4)


@pytest.fixture
def costs_of(monkeypatch):
    """Returns a function (device, whole) -> costs of a model with 64 patches, where each token costs a block 1 ms.

    Its argument `whole` maps the sum over the blocks to the estimate of the whole program, in seconds.
    """
    def costs_of(device, whole):
        part = {n: n / 2000 for n in (2, 65)}
        table = CostTable({}, 0.0, None, attention=part, mlp=part, last_block={n: n / 1000 for n in (2, 65)},
                          heads={}, reduction={name: {2: 0.0, 65: 0.0} for name in ('evit', 'tome', 'ward')})
        monkeypatch.setattr(cost_table, 'load_or_measure', lambda *_: table)
        own = BenchmarkModel('', CONFIG, 32, 'bfloat16', evit_jax.create_model(CONFIG).loaded.budget, '')
        request = CostRequest('', 32, 8, 'bfloat16', device, True, own, ('evit', 'tome', 'ward'))
        costs = PlanCosts(request, ['x'], None, 1.0, 1)
        compiled = []

        def estimate(_, plan):
            compiled.append(plan)
            return whole(costs.seconds(plan))

        monkeypatch.setattr(cost_measurement, 'estimate_plan', estimate)
        return costs, compiled

    return costs_of


WHOLE = {'equal': lambda sum: sum, 'power': lambda sum: sum**0.8, 'overhead': lambda sum: 0.04 + 0.9 * sum,
         'slower above a size': lambda sum: sum * (1.5 if sum > 0.2 else 1)}


@pytest.mark.parametrize('whole, text', [
    *itertools.product(('equal', 'power', 'overhead'), ('1.5x', '2x', '60img/s')), ('slower above a size', '2x')])
def test_budget_on_a_tpu_reaches_the_target_with_the_whole_program(costs_of, whole, text):
    costs, compiled = costs_of('tpu_v5e', WHOLE[whole])
    target = parse_target(text)
    budget = costs.budget(target, WARD)
    plan = _plan_within(costs.seconds, budget / costs.seconds(costs.dense), plans_of(WARD, 64, 4))
    assert costs.whole_seconds(plan) == pytest.approx(costs.seconds_for(target), rel=0.06)
    assert len(compiled) <= 5 and len(set(compiled)) == len(compiled)


def test_budget_on_this_device_is_the_sum_of_the_blocks_and_compiles_nothing(costs_of):
    costs, compiled = costs_of('this', lambda sum: 2 * sum)
    assert costs.budget(parse_target('2x'), WARD) == pytest.approx(costs.seconds(costs.dense) / 2)
    assert costs.budget(parse_target('0.5MACs'), WARD) == pytest.approx(costs.config.macs(costs.dense) / 2)
    assert not compiled and not costs.is_estimated(parse_target('2x'))


def test_budget_on_a_tpu_slower_than_the_whole_dense_program_is_refused(costs_of):
    costs, _ = costs_of('tpu_v5e', lambda sum: 2 * sum)
    with pytest.raises(ValueError, match=r'target=10img/s is slower than the dense model, which has 15.38img/s'):
        costs.budget(parse_target('10img/s'), WARD)


@pytest.mark.parametrize('factor, warns', [(1.0, False), (1.3, True)])
def test_search_for_a_tpu_estimates_the_whole_program_of_the_result(costs_of, monkeypatch, caplog, factor, warns):
    costs, _ = costs_of('tpu_v5e', lambda sum: sum)
    found = []
    monkeypatch.setattr(cost_measurement, 'estimate_plan',
                        lambda _, plan: costs.seconds(plan) * (factor if plan in found else 1))
    images = tiny.images(4, size=32)
    data = CalibrationImages(tuple('abcd'), images, None)
    settings = Settings((parse_target('2x'),), ('ward',), 0.01, batch=8, device='tpu_v5e')
    result, = search_plans(evit_jax.create_model(CONFIG).loaded, data, data, settings,
                           lambda _, each: found.append(each.plan)).targets
    figures = result.plans[SEARCHED].figures
    assert figures['estimated_speed_up'] == pytest.approx(figures['predicted_speed_up'] / factor)
    assert ('the whole program of the searched plan takes' in caplog.text) == warns
