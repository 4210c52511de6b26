"""The plan program with --data, run in the process of the test."""

import json

import pytest
from PIL import Image

import evit_jax
from evit_jax.planning import speed_up
from evit_jax.reduction.plan_file import read_plan_file
from tests.helpers import cost_tables, program_modules, tiny

plan, run_plan = program_modules.module_fixture('plan'), cost_tables.run_plan
FAST = ['--reducers=prune_merge,tome', '--minutes=0.1', '--nomeasure']


@pytest.fixture
def model(tmp_path):
    tiny.model().save(tmp_path / 'weights')
    return tmp_path / 'weights'


@pytest.fixture
def photos(tmp_path):
    (tmp_path / 'photos').mkdir()
    for index, pixels in enumerate(tiny.images(6)):
        Image.fromarray(pixels).save(tmp_path / 'photos' / f'{index}.png')
    return tmp_path / 'photos'


def test_plan_on_images_writes_a_plan_that_load_takes(run_plan, model, photos, tmp_path):
    out = tmp_path / 'fast.json'
    code, printed, err = run_plan(f'--model={model}', f'--data={photos}', '--target=0.7MACs', f'--out={out}',
                                  f'--report={tmp_path}/fast.html', *FAST)
    assert code == 0, err
    page = (tmp_path / 'fast.html').read_text()
    assert 'http://' not in page.replace('http://www.w3.org', '') and 'worst' in page and 'target 0.7MACs' in page
    assert [row.split('  ')[0] for row in printed.splitlines()[-4:]] == [
        'dense', '0.7MACs: searched', '0.7MACs: EViT, constant rate', '0.7MACs: ToMe, constant r']
    content, read = json.loads(out.read_text()), read_plan_file(out)
    assert read.reducer in ('prune_merge', 'tome') and read.architecture and read.weights
    assert content['figures']['searched']['macs_fraction'] <= 0.7
    assert content['images'] == {'search': 4, 'check': 2} and content['error'] == 'KL divergence'
    loaded = evit_jax.load(model).with_plan(plan=out)
    assert str(loaded.plan) == content['figures']['searched']['plan']
    assert (tmp_path / 'fast.json.search').exists()


def test_plan_on_images_with_several_targets_writes_a_plan_for_each(run_plan, model, photos, tmp_path):
    code, printed, err = run_plan(f'--model={model}', f'--data={photos}', '--targets=0.8MACs,0.7MACs',
                                  f'--out={tmp_path}/fast.json', *FAST)
    assert code == 0, err
    tokens = [sum(read_plan_file(tmp_path / f'fast-{target}.json').tokens) for target in ('0.8MACs', '0.7MACs')]
    assert tokens[0] >= tokens[1] and '0.7MACs: searched' in printed


def test_plan_on_images_that_is_stopped_in_the_check_leaves_the_plan(run_plan, model, photos, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed_up, '_checked', stop)
    code, _, _ = run_plan(f'--model={model}', f'--data={photos}', '--target=0.7MACs', f'--out={tmp_path}/fast.json',
                          *FAST)
    assert code
    content = json.loads((tmp_path / 'fast.json').read_text())
    assert content['target'] == '0.7MACs' and 'figures' not in content
    assert evit_jax.load(model).with_plan(plan=tmp_path / 'fast.json').plan.reductions


def test_plan_on_images_times_the_plans(run_plan, model, photos, tmp_path):
    code, _, err = run_plan(
        f'--model={model}', f'--data={photos}', '--target=0.8MACs', '--batch=2', '--seconds=0.05', '--rounds=2',
        '--reducers=tome', '--minutes=0.1', f'--out={tmp_path}/fast.json')
    assert code == 0, err
    figures = json.loads((tmp_path / 'fast.json').read_text())['figures']
    assert figures['dense']['measured_speed_up'] == 1 and figures['searched']['measured_speed_up'] > 0


@pytest.mark.parametrize('words, message', [
    (['--model=deit_s'], 'deit_s has no weights, and --data searches by the outputs of a trained model'),
    (['--reducers=dynamicvit'], 'reducer dynamicvit has learned modules, trained for the blocks that reduce'),
    (['--reducers=tomme'], 'did you mean tome'),
    (['--target=1.5MACs'], 'is slower than the dense model'),
    (['--target=0.01MACs'], 'no plan costs at most'),
    (['--data=nowhere'], 'nowhere'),
    (['--out=/proc/plan.json'], '--out=/proc/plan.json cannot be written'),
    (['--image_size=17'], '17')], ids=str)
def test_plan_on_images_with_bad_input_names_it_and_exits_with_2(run_plan, model, photos, words, message):
    given = {word.partition('=')[0] for word in words}
    defaults = {'--model': model, '--data': photos, '--target': '0.7MACs'}
    code, _, err = run_plan(*(f'{name}={value}' for name, value in defaults.items() if name not in given), *FAST[1:],
                            *words)
    assert code == 2 and message in err, err


def test_plan_without_images_for_several_targets_raises(run_plan):
    code, _, err = run_plan('--model=vit_layouts', '--target=2x,3x')
    assert code == 2 and 'are 2 targets: give one, or images in --data' in err
