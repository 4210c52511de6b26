"""Cost tables: the costs of plans that are computed from them, and their file."""

import importlib.metadata

import jax
import pytest

from evit_jax.benchmarks import tpu
from evit_jax.planning import cost_measurement, cost_table
from evit_jax.planning.cost_table import CostRequest
from evit_jax.reduction.plan import make_plan
from tests.helpers import layouts
from tests.helpers.cost_tables import make_table

least = layouts.least
REQUEST = CostRequest('vit_layouts', 16, 2, 'float32', 'this')


def dense_plan():
    return cost_measurement.workload_of(REQUEST, make_plan(16, 2, reduce_at=())).plan


def test_nondecreasing_pools_falling_costs_to_their_mean():
    costs = {1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 9.0}
    assert cost_table.nondecreasing(costs) == {1: 1.0, 2: 2.5, 3: 2.5, 4: 2.5, 5: 9.0}
    assert cost_table.nondecreasing({1: 3.0, 2: 2.0, 3: 1.0}) == {1: 2.0, 2: 2.0, 3: 2.0}


def test_costs_of_the_dense_model_equal_its_measured_time():
    dense = jax.tree.map(float, make_table().costs(17, 1).total(dense_plan()))
    assert dense == pytest.approx(1 + 2 * 1.7 + 0.6)
    scaled = make_table(dense=9.0).costs(17, 1)
    assert scaled.total(dense_plan()) == pytest.approx(9.0) and scaled.block.entering[10] == pytest.approx(8 / 4)


def test_costs_of_a_reduction_in_the_last_block_save_nothing():
    costs = make_table().costs(17, 1)
    first, last = (make_plan(16, 2, tokens=(6,), reduce_at=(block,)) for block in (0, 1))
    reduction = 0.1 + 0.1 * 13 / 13
    assert costs.total(first) == pytest.approx(1 + 1.7 + reduction + 0.8 + (0.3 + 0.3 * 6 / 15))  # 8 tokens leave
    assert costs.total(last) == pytest.approx(costs.total(dense_plan()))


def test_costs_of_heads_on_patches_follow_the_tokens_of_the_last_block():
    costs = make_table(last_block={}, heads={2: 0.1, 17: 0.4}).costs(17, 1)
    assert costs.total(dense_plan()) == pytest.approx(1 + 2 * 2 * 1.7)  # `outside` holds the heads on all tokens
    last = make_plan(16, 2, tokens=(6,), reduce_at=(1,))
    assert costs.total(last) == pytest.approx(1 + 2 * 1.7 + 1.7 + 0.2 + 0.8 - (0.4 - (0.1 + 0.3 * 6 / 15)))
    scaled = make_table(dense=9.0, last_block={}, heads={2: 0.1, 17: 0.4}).costs(17, 1)
    assert scaled.total(dense_plan()) == pytest.approx(9.0)


def test_load_or_measure_measures_once_and_refuses_another_table(tmp_path):
    file, measured = tmp_path / 'below' / 'costs.json', []

    def make(request):
        measured.append(request)
        return make_table()

    first = cost_table.load_or_measure(REQUEST, make, file)
    assert cost_table.load_or_measure(REQUEST, make, file) == first
    assert measured == [REQUEST] and first.attention[5] == 0.5
    with pytest.raises(ValueError, match=r'--costs=.* holds costs for batch=2, and batch=8 is needed: give another'):
        cost_table.load_or_measure(REQUEST._replace(batch=8), make, file)
    file.write_text('{}')
    with pytest.raises(ValueError, match=r'holds no costs .*: delete it'):
        cost_table.load_or_measure(REQUEST, make, file)


def test_key_changes_with_the_source_code(tmp_path, monkeypatch):
    for name in ('models/__init__', 'reduction/plan', 'planning/model_parts', 'benchmarks/tpu', 'benchmarks/hlo'):
        file = tmp_path / f'{name}.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    monkeypatch.setattr(cost_table.models, '__file__', str(tmp_path / 'models/__init__.py'))
    monkeypatch.setattr(cost_table, 'source_digest', cost_table.source_digest.__wrapped__)  # not cached
    before = REQUEST.key()
    assert REQUEST.key() == before
    file.write_text('changed')
    assert REQUEST.key() != before


def test_load_or_measure_without_file_uses_one_cache_file_for_each_key(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for batch in (2, 8, 2):
        cost_table.load_or_measure(REQUEST._replace(batch=batch), lambda request: make_table(), None)
    assert len(list((tmp_path / '.cache/evit_jax/costs').glob('vit_layouts_*.json'))) == 2


def test_key_of_an_estimate_changes_with_the_compiler(monkeypatch):
    request, keys = REQUEST._replace(device='tpu_v5e'), []
    for version in ('0.0.42', '0.0.43'):
        monkeypatch.setattr(tpu.importlib.metadata, 'version', lambda package, version=version: version)
        keys.append(request.key())
    assert [key['libtpu'] for key in keys] == ['0.0.42', '0.0.43'] and 'libtpu' not in REQUEST.key()

    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(tpu.importlib.metadata, 'version', absent)
    assert request.key()['libtpu'] == ''
