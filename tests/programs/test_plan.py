"""The plan program, run in the process of the test."""

import json
import re

import pytest

from evit_jax import models
from evit_jax.benchmarks.benchmark_model import find_model
from evit_jax.checkpoints.loaded import load_model
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.planning import cost_measurement, cost_table
from evit_jax.planning.cost_table import CostRequest
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import read_plan_file
from evit_jax.reduction.reducer import Modules
from evit_jax.reduction.reducers import DYNAMICVIT, TOME
from tests.helpers import cost_tables, layouts, program_modules
from tests.helpers.cost_tables import make_table
from tests.helpers.weights import save_random_run

least, plan, run_plan = layouts.least, program_modules.module_fixture('plan'), cost_tables.run_plan
REQUEST = CostRequest('vit_layouts', 16, 2, 'float32', 'this')


@pytest.fixture(autouse=True)
def lvvit_tiny(monkeypatch):
    """A model whose heads read all tokens."""
    config = LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=5, stem_width=4)
    monkeypatch.setitem(models.CONFIGS, 'lvvit_tiny', config)
    return config


@pytest.fixture
def costs_file(tmp_path):
    """A file with synthetic costs."""
    cost_table.load_or_measure(REQUEST, lambda request: make_table(), tmp_path / 'costs.json')
    return tmp_path / 'costs.json'


def test_plan_for_this_device_measures_and_writes_a_plan_file(run_plan, tmp_path):
    out, costs_file = tmp_path / 'plan.json', tmp_path / 'costs.json'
    words = ['--model=vit_layouts', '--image-size=16', '--target=1.2MMACs', '--device=this', '--batch=2',
             f'--costs={costs_file}', f'--out={out}', '--seconds=0.05', '--rounds=2', '--blocks=0,1']
    code, printed, err = run_plan(*words)
    assert code == 0, err
    planned, content = read_plan_file(out), json.loads(out.read_text())
    assert planned.model == 'vit_layouts' and planned.patches == 16 and planned.reduce_at
    assert content['speeds']['plan']['macs'] <= 1.2e6 < content['speeds']['dense']['macs']
    assert content['speeds']['plan']['measured_images_per_second'] > 0
    assert [line.split(':')[0] for line in printed.splitlines()[1:4]] == ['dense', 'constant rate', 'plan']
    assert {2, 4, 16, 17} <= set(map(int, json.loads(costs_file.read_text())['attention']))
    code, again, _ = run_plan(*words, '--nomeasure')
    assert code == 0 and 'measured' not in again and again.splitlines()[3] == printed.splitlines()[3]


def test_plan_of_rectangles_is_for_their_number_of_patches(run_plan, tmp_path):
    costs_file, out = tmp_path / 'costs.json', tmp_path / 'plan.json'
    cost_table.load_or_measure(REQUEST._replace(image_size=(16, 8)), lambda request: make_table(), costs_file)
    code, printed, err = run_plan('--model=vit_layouts', '--image_size=16x8', '--target=1.02x', '--batch=2',
                                  '--blocks=0,1', '--nomeasure', f'--costs={costs_file}', f'--out={out}')
    assert code == 0, err
    planned = read_plan_file(out)
    assert (planned.image_size, planned.patches) == ((16, 8), 8) and ', 16x8 px, ' in printed


def test_plan_for_a_speed_up_reaches_it_by_the_table(run_plan, costs_file, tmp_path):
    for target, least in (('1.1x', 1.1), ('1.04x', 1.04)):
        code, printed, err = run_plan('--model=vit_layouts', f'--target={target}', '--batch=2', f'--costs={costs_file}',
                                      '--nomeasure', '--blocks=0,1', f'--out={tmp_path / "p.json"}')
        assert code == 0, err
        speeds = json.loads((tmp_path / 'p.json').read_text())['speeds']
        assert least <= speeds['plan']['speed_up'] < least + 0.06
        assert speeds['plan']['tokens'] >= speeds['constant rate']['tokens'] - 0.05


def test_plan_for_macs_counts_heads_on_patch_tokens(run_plan, lvvit_tiny, tmp_path):
    expected, costs_file = make_plan(16, 2, tokens=(8,), reduce_at=(1,)), tmp_path / 'costs.json'
    cost_table.load_or_measure(REQUEST._replace(model='lvvit_tiny'),
                               lambda request: make_table(last_block={}, heads={2: 0.1, 17: 0.4}), costs_file)
    code, _, err = run_plan('--model=lvvit_tiny', f'--target={lvvit_tiny.macs(expected) / 1e6}MMACs', '--batch=2',
                            '--blocks=1', '--nomeasure', f'--costs={costs_file}', f'--out={tmp_path / "p.json"}')
    assert code == 0, err
    assert read_plan_file(tmp_path / 'p.json').tokens == (8,)


def test_plan_prints_which_tokens_it_counts_and_where_costs_jump(run_plan, tmp_path):
    stairs = {n: 1 + n / 100 + (n > 8) for n in range(2, 18)}
    cost_table.load_or_measure(REQUEST, lambda request: make_table(attention=stairs), tmp_path / 'stairs.json')
    cost_table.load_or_measure(REQUEST, lambda request: make_table(), tmp_path / 'line.json')
    words = ['--model=vit_layouts', '--target=1.04x', '--batch=2', '--nomeasure', '--blocks=0,1']
    _, printed, _ = run_plan(*words, f'--costs={tmp_path / "stairs.json"}')
    jump = "a block with 9 tokens costs 59% more than with 8"
    assert f"\ncounts are without the class token; with it, {jump}\n" in printed
    assert '\ncounts are without the class token\n' in run_plan(*words, f'--costs={tmp_path / "line.json"}')[1]


@pytest.mark.parametrize('words, message', [
    ((), 'give both --model NAME and --target SPEED'),
    (('--target=99x',), 'cannot be reached by dropping tokens at 3 of the blocks 0 to 1: the fastest plan, 16 > .*'
                        'tokens at blocks .*, has 1.*x, .*img/s, .*GMACs: lower the target'),
    (('--target=0.5x',), '--target=0.5x is slower than the dense model, which has 1x'),
    (('--target=2 parsecs',), 'is not a number with one of the units x'),
    (('--target=2x', '--device=tpu_v9'), "unknown device 'tpu_v9': did you mean tpu_v"),
    (('--target=2x', '--image_size=17'), 'image size 17 is not divisible'),
    (('--target=2x', '--image_size=16x8x3'), '--image_size=16x8x3 must be a side or HEIGHTxWIDTH'),
    (('--target=2x', '--blocks=5'), 'block 5 is outside 0..1'),
    (('--target=2x', '--model=vit_layout'), "unknown model 'vit_layout': did you mean vit_layouts")])
def test_plan_with_bad_flags_exits_with_one_line(run_plan, costs_file, words, message):
    code, _, err = run_plan('--model=vit_layouts', '--batch=2', '--blocks=0,1', f'--costs={costs_file}', '--nomeasure',
                            *words)
    assert code == 2 and err.count('\n') == 1
    assert re.search(message, err), err


def test_plan_for_a_run_uses_its_blocks_and_the_run_accepts_it(run_plan, tmp_path):
    run = save_random_run(tmp_path / 'a', model__reduce_at=(0,), model__fuse=False)
    costs_file, out = tmp_path / 'costs.json', tmp_path / 'plan.json'
    request = CostRequest('vit_layouts', 16, 2, 'float32', 'this', False, find_model('--model', run))
    cost_table.load_or_measure(request, lambda request: make_table(), costs_file)
    code, printed, err = run_plan(f'--model={run}', '--target=1.04x', '--batch=2', f'--costs={costs_file}',
                                  '--nomeasure', f'--out={out}')
    assert code == 0, err
    planned = read_plan_file(out)
    assert planned.reduce_at == (0,) and not planned.fuse and json.loads(out.read_text())['run'] == run
    assert printed.startswith(f'{run} (vit_layouts), 16 px, batch 2, float32')
    assert load_model(run).plan(plan=planned).reductions == (0,)


def test_workload_of_a_plan_has_its_reducer_and_the_run(tmp_path):
    model = find_model('--model', save_random_run(tmp_path / 'a', reducer__name='tome', reducer__r=3))
    request = CostRequest('vit_layouts', 16, 2, 'float32', 'this', False, model)
    workload = cost_measurement.workload_of(request, make_plan(16, 2, tokens=(9,), reduce_at=(1,), reducer=TOME))
    assert workload.reducer == TOME and workload.plan.counts == (16, 9) and workload.run == model.run


@pytest.mark.parametrize('changes, words, message', [
    ({'reducer__name': 'dynamicvit', 'modules': Modules(DYNAMICVIT, 2)}, (),
     'whose learned modules were trained at the blocks .0, 1.'),
    ({'reducer__name': 'tome', 'reducer__r': 3}, ('--least_rate=0.4',), 'keeps at least half of the tokens')])
def test_plan_for_a_reducer_without_support_for_it_exits(run_plan, tmp_path, changes, words, message):
    run = save_random_run(tmp_path / 'a', **changes)
    code, _, err = run_plan(f'--model={run}', '--target=1.1x', '--nomeasure', *words)
    assert code == 2 and re.search(message, err), err
