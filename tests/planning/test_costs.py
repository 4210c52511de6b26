"""The planner's tables of costs, and the program that plans."""

import importlib.metadata
import json
import re
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from evit_jax import cli, models
from evit_jax.benchmarks import parts, tpu
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.planning import costs
from evit_jax.planning.costs import Asked, Table
from evit_jax.planning.search import cliffs
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import read_plan_file
from tests.helpers import doors, layouts

least, plan = layouts.least, doors.imported('plan')
ASKED = Asked('vit_layouts', 16, 2, 'float32', 'this')


@pytest.fixture(autouse=True)
def lvvit_tiny(monkeypatch):
    """A model whose heads read all tokens."""
    config = LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=5, stem_width=4)
    monkeypatch.setitem(models.CONFIGS, 'lvvit_tiny', config)
    return config


def leap(n):
    """Of a block on a TPU, about: dear from 129 tokens on."""
    return 10 * n + n * n / 50 + 400 * (n > 128)


def test_a_cliff_is_looked_for_where_the_slope_jumps_and_found_to_the_token():
    asked = []
    found = costs.refined(lambda n: asked.append(n) or leap(n), costs.spread(2, 197))
    assert {128, 129} <= set(costs.spread(2, 197))  # the compiler has a smaller leap from 127 to 128, too
    assert (128, 129) in cliffs(found) and len(asked) == len(set(asked)) == len(found) < 20
    assert found == {n: leap(n) for n in found}
    smooth = costs.refined(lambda n: 10 * n + n * n / 50, costs.spread(2, 197))
    assert len(smooth) <= len(costs.spread(2, 197)) + 2 and not cliffs(smooth)


def test_every_fourth_count_is_measured_and_the_edges_of_tiles():
    assert costs.counts(2, 20) == [2, 4, 8, 12, 16, 20]
    found = costs.counts(2, 577)
    assert {2, 128, 129, 256, 257, 512, 513, 577} <= set(found) and len(found) < 50 and found == sorted(found)


def test_what_falls_with_the_count_is_levelled_and_the_mean_stays():
    assert costs.rising({1: 1.0, 2: 3.0, 3: 2.0, 4: 2.5, 5: 9.0}) == {1: 1.0, 2: 2.5, 3: 2.5, 4: 2.5, 5: 9.0}
    assert costs.rising({1: 3.0, 2: 2.0, 3: 1.0}) == {1: 2.0, 2: 2.0, 3: 2.0}


def table(**changes):
    known = {n: n / 10 for n in range(2, 18)}
    return Table(**{'of': {'depth': 2}, 'outside': 1.0, 'dense': None, 'attention': known, 'mlp': known,
                    'reduction': {4: 0.1, 17: 0.2}, 'short': {2: 0.3, 17: 0.6}, 'heads': {}} | changes)


def test_the_dense_model_costs_what_it_was_timed_to():
    dense = jax.tree.map(float, table().costs(17, 1).of(layouts_plan()))
    assert dense == pytest.approx(1 + 2 * 1.7 + 0.6)
    scaled = table(dense=9.0).costs(17, 1)
    assert scaled.of(layouts_plan()) == pytest.approx(9.0) and scaled.block.entering[10] == pytest.approx(8 / 4)


def test_the_last_block_costs_what_it_does_alone_and_dropping_in_it_nothing():
    prices = table().costs(17, 1)
    first, last = (make_plan(16, 2, tokens=(6,), reduce_at=(block,)) for block in (0, 1))
    reduction = 0.1 + 0.1 * 13 / 13
    assert prices.of(first) == pytest.approx(1 + 1.7 + reduction + 0.8 + (0.3 + 0.3 * 6 / 15))  # 6, fused and class: 8
    assert prices.of(last) == pytest.approx(prices.of(layouts_plan()))


def test_heads_that_read_all_tokens_cost_by_those_that_leave_the_last_block():
    prices = table(short={}, heads={2: 0.1, 17: 0.4}).costs(17, 1)
    assert prices.of(layouts_plan()) == pytest.approx(1 + 2 * 2 * 1.7)  # the heads of all are in what is outside
    last = make_plan(16, 2, tokens=(6,), reduce_at=(1,))
    assert prices.of(last) == pytest.approx(1 + 2 * 1.7 + 1.7 + 0.2 + 0.8 - (0.4 - (0.1 + 0.3 * 6 / 15)))
    scaled = table(dense=9.0, short={}, heads={2: 0.1, 17: 0.4}).costs(17, 1)
    assert scaled.of(layouts_plan()) == pytest.approx(9.0)


@pytest.mark.parametrize('name', ['vit_layouts', 'lvvit_tiny'])
def test_the_end_is_measured_as_the_model_runs_it(name):
    config = models.get_config(name)
    model, plan = models.create(config), make_plan(16, 2, tokens=(6,), reduce_at=(0,))
    params = model.init(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))

    @jax.jit
    def applied(params, images):
        logits, seen = model.apply(params, images, plan)
        return logits, {name: seen[name] for name in ('block00', 'block01', 'kept')}

    logits, seen = applied(params, images)
    if name == 'vit_layouts':
        x = parts.short_block(config, 8, 2, 'float32').run(params['blocks'][1], seen['block00'])
        assert x.shape == (2, 1, 64)
        np.testing.assert_allclose(x, seen['block01'][:, :1], atol=1e-5)
    else:
        part = parts.heads(config, 8, 2, 'float32')
        found = part.run(params | {'blocks': {}}, seen['block01'], seen['kept'][-1])
        np.testing.assert_allclose(found, logits, atol=1e-5)


@pytest.mark.parametrize('name', ['vit_layouts', 'lvvit_tiny'])
def test_the_end_done_again_begins_with_what_it_left(name):
    config = models.get_config(name)
    _, end = costs._end(config)
    once, twice = (end(config, 5, 2, 'float32', times) for times in (1, 2))
    arguments = once.filled(0)
    first, second = jax.jit(once.run)(*arguments), jax.jit(twice.run)(*arguments)
    assert first.shape == second.shape and np.abs(first - second).max() > 1e-6


def layouts_plan():
    return costs.case_of(ASKED, make_plan(16, 2, reduce_at=())).plan


def test_halves_make_a_block_and_a_reduction_keeps_half():
    shape = layouts.SHAPE
    for name in parts.HALVES:
        once, twice = (parts.half(shape, name, 5, 2, 'float32', times) for times in (1, 2))
        params, x = once.filled(0)
        np.testing.assert_allclose(jax.jit(twice.run)(params, x), once.run(params, once.run(params, x)), atol=1e-5)
    part = parts.reduction(shape, 9, 2, 'float32', fuse=True)
    _, x, score = part.filled(0)
    assert part.run({}, x, score).shape == (2, 1 + 4 + 1, 64)
    np.testing.assert_array_equal(part.run({}, x, score)[0, 1], x[0, 1 + score[0].argmax()])


def test_a_table_is_made_once_and_not_taken_for_another(tmp_path):
    file, made = tmp_path / 'below' / 'costs.json', []

    def make(asked):
        made.append(asked)
        return table()

    first = costs.find(ASKED, make, file)
    assert costs.find(ASKED, make, file) == first and made == [ASKED] and first.attention[5] == 0.5
    with pytest.raises(ValueError, match=r'--costs=.* are those of batch=2, and batch=8 is asked for: name another'):
        costs.find(ASKED._replace(batch=8), make, file)
    file.write_text('{}')
    with pytest.raises(ValueError, match=r'holds no costs .*: delete it'):
        costs.find(ASKED, make, file)


def test_other_code_has_other_costs(tmp_path, monkeypatch):
    for name in ('models/__init__', 'reduction/plan', 'benchmarks/parts', 'benchmarks/tpu', 'benchmarks/hlo'):
        file = tmp_path / f'{name}.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(name)
    monkeypatch.setattr(costs.models, '__file__', str(tmp_path / 'models/__init__.py'))
    monkeypatch.setattr(costs, '_sources', costs._sources.__wrapped__)  # asked anew
    before = ASKED.key()
    assert ASKED.key() == before
    file.write_text('changed')
    assert ASKED.key() != before


def test_by_itself_a_table_lies_in_the_cache_of_the_user_under_what_it_is_of(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    for batch in (2, 8, 2):
        costs.find(ASKED._replace(batch=batch), lambda asked: table(), None)
    assert len(list((tmp_path / '.cache/evit_jax/costs').glob('vit_layouts_*.json'))) == 2


def test_an_estimate_of_another_compiler_is_another(monkeypatch):
    asked, keys = ASKED._replace(device='tpu_v5e'), []
    for version in ('0.0.42', '0.0.43'):
        monkeypatch.setattr(tpu.importlib.metadata, 'version', lambda package, version=version: version)
        keys.append(asked.key())
    assert [key['libtpu'] for key in keys] == ['0.0.42', '0.0.43'] and 'libtpu' not in ASKED.key()

    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(tpu.importlib.metadata, 'version', absent)
    assert asked.key()['libtpu'] == ''


@pytest.fixture
def program(plan, capsys, monkeypatch):
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)

    def run(*words):
        monkeypatch.setattr(sys, 'argv', ['plan', *map(str, words)])
        with flagsaver.flagsaver():
            try:
                cli.run(plan.main)
                code = 0
            except SystemExit as error:
                code = error.code
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_the_program_measures_plans_measures_again_and_writes_what_others_read(program, tmp_path):
    out, kept = tmp_path / 'plan.json', tmp_path / 'costs.json'
    words = ['--model=vit_layouts', '--image-size=16', '--target=1.2MMACs', '--device=this', '--batch=2',
             f'--costs={kept}', f'--out={out}', '--seconds=0.05', '--rounds=2', '--blocks=0,1']
    code, said, err = program(*words)
    assert code == 0, err
    planned, told = read_plan_file(out), json.loads(out.read_text())
    assert planned.model == 'vit_layouts' and planned.patches == 16 and planned.reduce_at
    assert told['speeds']['plan']['macs'] <= 1.2e6 < told['speeds']['dense']['macs']
    assert told['speeds']['plan']['measured_images_per_second'] > 0
    assert [line.split(':')[0] for line in said.splitlines()[1:4]] == ['dense', 'plain rate', 'plan']
    assert {2, 4, 16, 17} <= set(map(int, json.loads(kept.read_text())['attention']))
    code, again, _ = program(*words, '--nomeasure')
    assert code == 0 and 'measured' not in again and again.splitlines()[3] == said.splitlines()[3]


@pytest.fixture
def kept(tmp_path):
    """A file with costs that nobody has measured."""
    costs.find(ASKED, lambda asked: table(), tmp_path / 'costs.json')
    return tmp_path / 'costs.json'


def test_the_speed_that_is_asked_for_is_met_by_the_table(program, kept, tmp_path):
    for target, least in (('1.1x', 1.1), ('1.04x', 1.04)):
        code, said, err = program('--model=vit_layouts', f'--target={target}', '--batch=2', f'--costs={kept}',
                                  '--nomeasure', '--blocks=0,1', f'--out={tmp_path / "p.json"}')
        assert code == 0, err
        speeds = json.loads((tmp_path / 'p.json').read_text())['speeds']
        assert least <= speeds['plan']['speed_up'] < least + 0.06
        assert speeds['plan']['tokens'] >= speeds['plain rate']['tokens'] - 0.05


def test_a_target_in_multiply_accumulates_has_heads_by_what_they_read(program, lvvit_tiny, tmp_path):
    wanted, kept = make_plan(16, 2, tokens=(8,), reduce_at=(1,)), tmp_path / 'costs.json'
    costs.find(ASKED._replace(model='lvvit_tiny'), lambda asked: table(short={}, heads={2: 0.1, 17: 0.4}), kept)
    code, _, err = program('--model=lvvit_tiny', f'--target={lvvit_tiny.macs(wanted) / 1e6}MMACs', '--batch=2',
                           '--blocks=1', '--nomeasure', f'--costs={kept}', f'--out={tmp_path / "p.json"}')
    assert code == 0, err
    assert read_plan_file(tmp_path / 'p.json').tokens == (8,)


def test_it_says_which_tokens_its_counts_are_and_where_a_block_leaps(program, tmp_path):
    stairs = {n: 1 + n / 100 + (n > 8) for n in range(2, 18)}
    costs.find(ASKED, lambda asked: table(attention=stairs), tmp_path / 'stairs.json')
    costs.find(ASKED, lambda asked: table(), tmp_path / 'line.json')
    words = ['--model=vit_layouts', '--target=1.04x', '--batch=2', '--nomeasure', '--blocks=0,1']
    _, said, _ = program(*words, f'--costs={tmp_path / "stairs.json"}')
    assert '\ncounts are without the class token; with it, a block with 9 tokens costs 59% more than with 8\n' in said
    assert '\ncounts are without the class token\n' in program(*words, f'--costs={tmp_path / "line.json"}')[1]


@pytest.mark.parametrize('words, said', [
    ((), 'give both --model NAME and --target SPEED'),
    (('--target=99x',), 'cannot be reached by dropping tokens at 3 of the blocks 0 to 1: the fastest plan, 16 > .*'
                        'tokens at blocks .*, has 1.*x, .*img/s, .*GMACs: ask for less'),
    (('--target=0.5x',), '--target=0.5x is slower than the dense model, which has 1x'),
    (('--target=2 parsecs',), 'is no number with one of the units x'),
    (('--target=2x', '--device=tpu_v9'), "unknown device 'tpu_v9': did you mean tpu_v"),
    (('--target=2x', '--image_size=17'), 'image size 17 is not divisible'),
    (('--target=2x', '--blocks=5'), 'block 5 is outside 0..1'),
    (('--target=2x', '--model=vit_layout'), "unknown model 'vit_layout': did you mean vit_layouts")])
def test_what_cannot_be_is_told_in_a_line(program, kept, words, said):
    code, _, err = program('--model=vit_layouts', '--batch=2', '--blocks=0,1', f'--costs={kept}', '--nomeasure', *words)
    assert code == 2 and err.count('\n') == 1
    assert re.search(said, err), err
