"""Plan files: writing, reading, invalid files, and the flags of the program main."""

import contextlib
import itertools
import json
import sys

import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.checkpoints.workdir import flat
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.reduction.registry import get_reducer
from evit_jax.runtime import distributed
from evit_jax.training import checks, experiment, loop, model_setup
from tests.helpers import layouts, program_modules
from tests.helpers.benchmarks import combine_lists

least, main = layouts.least, program_modules.module_fixture('main')
PLAN = make_plan(16, 2, tokens=(9, 5), reduce_at=(0, 1), fuse=False)
PLAN_FILE = PlanFile.of(PLAN, 'vit_layouts', 16)


def write(path, plan_file=PLAN_FILE):
    path.write_text(json.dumps(plan_file.metadata() | {'machine': {}, 'target': '2x'}))
    return path


def test_read_plan_file_after_writing_returns_the_plan(tmp_path):
    path = write(tmp_path / 'plan.json')
    assert read_plan_file(path) == PLAN_FILE._replace(path=str(path))
    assert PlanFile.of(make_plan(16, 2, rate=1.0, reduce_at=(1,)), 'a', 16).tokens == ()


@pytest.mark.parametrize('text, message', [
    (None, 'cannot be read .No such file'), ('{', 'holds no plan .Expecting'), ('[]', 'holds no plan'),
    ('{"model": "deit_s"}', 'holds no plan .*missing'),
    (json.dumps(PLAN_FILE._replace(reduce_at=(0, 7)).metadata()), 'block 7 is outside'),
    (json.dumps(PLAN_FILE._replace(tokens=()).metadata()), r'tokens=\(\) has 0 values for 2 reductions'),
    (json.dumps(PLAN_FILE.metadata() | {'tokens': {'9': 0, '5': 1}}), 'is a dict'),
    (json.dumps(PLAN_FILE.metadata() | {'fuse': 'false'}), '"fuse": "false" is neither true nor false')])
def test_read_plan_file_that_holds_no_plan_raises(tmp_path, text, message):
    if text is not None:
        (tmp_path / 'plan.json').write_text(text)
    with pytest.raises(ValueError, match=f'--plan=.*{message}.*python -m evit_jax.plan --out FILE'):
        read_plan_file(tmp_path / 'plan.json')


def test_for_model_with_another_model_raises_and_names_both():
    with pytest.raises(ValueError, match=r'p.json is for vit_layouts with 16 patches and 2 blocks, and this is '
                                         r'deit_s with 196 patches and 12 blocks: make one with .* --model=deit_s'):
        PLAN_FILE._replace(path='p.json').for_model('deit_s', 196, 12, 'abc')


SEARCHED = PlanFile.of(
    make_plan(16, 2, tokens=(12, 8), drop=(2, 1), reduce_at=(0, 1), reducer=get_reducer('prune_merge:mean')),
    'vit_layouts', 16, reducer='prune_merge:mean', architecture='1234', weights='abcd')._replace(path='p.json')


def test_read_plan_file_after_writing_a_searched_plan_returns_reducer_drops_and_digests(tmp_path):
    path = write(tmp_path / 'plan.json', SEARCHED._replace(image_size=(8, 32)))
    assert read_plan_file(path) == SEARCHED._replace(image_size=(8, 32), path=str(path))
    assert str(SEARCHED.plan()) == ('16 > 12 > 8 tokens at blocks (0, 1), prune_merge:mean, dropping 2 > 1 before the '
                                    'merges')


@pytest.mark.parametrize('changes, message', [
    ({'drop': [2]}, r'drop=\(2,\) has 1 values for 2 reductions'), ({'drop': [5, 0]}, 'drop at most 4'),
    ({'reducer': ''}, 'reducer evit does not drop'), ({'reducer': 'tome'}, 'reducer tome does not drop'),
    ({'reducer': 'prun_merge'}, 'prune_merge'), ({'reducer': 3}, '"reducer": 3 is no text'),
    ({'image_size': [16]}, r'"image_size": \[16\] is neither'), ({'image_size': 16.5}, '"image_size": 16.5 is neither'),
    ({'weights': None}, '"weights": null is no text')])
def test_read_plan_file_with_an_invalid_search_result_raises(tmp_path, changes, message):
    (tmp_path / 'plan.json').write_text(json.dumps(SEARCHED.metadata() | changes))
    with pytest.raises(ValueError, match=f'--plan=.* holds no plan .*{message}'):
        read_plan_file(tmp_path / 'plan.json')


def test_for_model_with_a_digest_compares_architectures_instead_of_names():
    assert SEARCHED.for_model('custom', 16, 2, '1234') == SEARCHED
    with pytest.raises(ValueError, match=r'vit_layouts \(architecture 1234\) with 16 .*vit_layouts \(architecture 99\) '
                                         'with 16 .*make one with'):
        SEARCHED.for_model('vit_layouts', 16, 2, '99')
    with pytest.raises(ValueError, match=r'16 patches and 2 blocks, and this .* 16 patches and 3 blocks'):
        SEARCHED.for_model('vit_layouts', 16, 3, '1234')


def test_for_model_with_other_patches_rescales_a_searched_plan_with_a_warning(caplog):
    scaled = SEARCHED.for_model('vit_layouts', 64, 2, '1234')
    assert (scaled.patches, scaled.tokens, scaled.drop) == (64, (48, 32), (8, 4))
    assert 'p.json was searched for 16 patches, and an image has 64' in caplog.text
    with pytest.raises(ValueError, match='is for vit_layouts with 16 patches'):
        PLAN_FILE.for_model('vit_layouts', 64, 2, '')


@pytest.mark.parametrize('patches', [1, 2, 3, 5, 9, 15, 17, 33, 100])
@pytest.mark.parametrize('reducer, tokens, drop, fuse', [
    ('prune_merge', (12, 8, 7), (2, 4, 0), False), ('tome', (8, 7, 4), (), False), ('evit', (12, 9, 3), (), True)])
def test_for_patches_of_any_number_gives_a_valid_plan(reducer, tokens, drop, fuse, patches):
    plan_file = PlanFile('a', 16, 16, 4, (0, 1, 3), tokens, fuse, reducer, drop)
    scaled = plan_file.for_patches(patches)
    plan = scaled.plan()
    assert plan.patches == patches and all(a >= b for a, b in itertools.pairwise((patches, *scaled.tokens)))
    assert plan_file.for_patches(16) == plan_file


def test_warn_of_other_weights_warns_unless_the_digests_are_equal_or_unknown(caplog):
    SEARCHED.warn_of_other_weights('abcd')
    PLAN_FILE.warn_of_other_weights('ef')
    assert not caplog.text
    SEARCHED.warn_of_other_weights('ef')
    assert caplog.text.count('other weights of vit_layouts') == 1


def test_values_of_plan_with_a_reducer_sets_it_and_refuses_another_explicit_one():
    config = flat(layouts.config_of(reducer__name='tome'))
    searched = SEARCHED._replace(architecture='')
    values = model_setup.values_of_plan(searched, config)
    assert (values['reducer.name'], values['keep.drop']) == ('prune_merge:mean', [2, 1])
    assert 'reducer.name' not in model_setup.values_of_plan(PLAN_FILE, config, ['reducer.name'])
    with pytest.raises(ValueError, match=r'p.json is for the reducer prune_merge:mean, and tome is given'):
        model_setup.values_of_plan(searched, config, ['reducer.name'])
    with pytest.raises(ValueError, match=r'give only one of --plan=p.json and --config.keep.drop=\(1, 1\)'):
        model_setup.values_of_plan(searched, config | {'keep.drop': (1, 1)}, ['keep.drop'])


def test_main_with_a_plan_trains_and_evaluates_with_it_instead_of_the_config(main, tmp_path, monkeypatch):
    configs, path = [], write(tmp_path / 'plan.json')
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)
    monkeypatch.setattr(distributed, 'distributed', lambda collective_errors: contextlib.nullcontext())
    for name in ('train', 'evaluate_workdir'):
        monkeypatch.setattr(loop, name, lambda config, workdir, plan_file, **_: configs.append(
            experiment.with_values(config, model_setup.values_of_plan(plan_file, flat(config)))))
    (tmp_path / 'recipe.py').write_text(
        'from tests.helpers import layouts\n'
        'def get_config():\n'
        '    config = layouts.config_of(keep__macs=0.7, keep__rates=(0.5,), keep__tokens=(3,))\n'
        '    return config.lock()\n')
    for mode in ('train', 'evaluate'):
        monkeypatch.setattr(sys, 'argv', ['main', f'--config={tmp_path / "recipe.py"}', f'--workdir={tmp_path}',
                                          f'--plan={path}', f'--mode={mode}'])
        with flagsaver.flagsaver():
            cli.run(main.main)
    assert len(configs) == 2 and configs[0].is_locked
    for config in configs:
        checks.check(flat(config))
        assert experiment.setup(config).plan == PLAN


@pytest.mark.parametrize('changes', [{'keep__rate': 0.2}, {'keep__macs': 0.5}, {'model__reduce_at': (1,)}])
def test_values_of_plan_with_explicit_keys_that_it_replaces_raises(changes):
    config, key = flat(layouts.config_of(**changes)), next(iter(changes)).replace('__', '.')
    with pytest.raises(ValueError, match=rf'give only one of --plan=\S* and --config.{key}='):
        model_setup.values_of_plan(PLAN_FILE, config, [key])
    same = flat(layouts.config_of(model__fuse=PLAN_FILE.fuse))
    values = model_setup.values_of_plan(PLAN_FILE, same, ['model.fuse', 'keep.rates', 'batch_size'])
    assert values['keep.tokens'] == [*PLAN_FILE.tokens]


@pytest.fixture
def start_main(main, tmp_path, monkeypatch):
    """A function that runs main with flags and returns the arguments of its evaluation, and its exit code."""
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)
    monkeypatch.setattr(distributed, 'distributed', lambda collective_errors: contextlib.nullcontext())
    monkeypatch.chdir(tmp_path)

    def start(*words):
        arguments = {}
        monkeypatch.setattr(loop, 'evaluate_workdir', lambda config, workdir, **options: arguments.update(
            options, config=config, workdir=workdir))
        monkeypatch.setattr(sys, 'argv', ['main', *words])
        with flagsaver.flagsaver():
            try:
                main.run()
            except SystemExit as end:
                arguments['code'] = end.code
        return arguments

    return start


def test_main_evaluate_without_a_config_passes_the_explicit_keys(start_main):
    arguments = start_main('--mode=evaluate', '--workdir=runs/a', '--config.keep.rate=0.5',
                           '--config.data.mean=(1,2,3)', '--out=b.json')
    assert (arguments['workdir'], arguments['from_file'], arguments['out']) == ('runs/a', False, 'b.json')
    assert sorted(arguments['explicit']) == ['data.mean', 'keep.rate']
    assert (arguments['config'].keep.rate, arguments['config'].data.mean) == (0.5, (1, 2, 3))


def test_main_evaluate_with_a_config_file_passes_the_explicit_keys(start_main, tmp_path):
    (tmp_path / 'mine.py').write_text('from configs import base\nget_config = base.get_config\n')
    arguments = start_main('--config=mine.py', '--mode=evaluate', '--workdir=runs/a', '--config.seed=3')
    assert arguments['from_file'] and [*arguments['explicit']] == ['seed']


@pytest.mark.parametrize('words, message', [
    (['--mode=evaluate'], 'give both --config FILE and --workdir DIR'), (['--workdir=a'], 'give both --config FILE'),
    (['--workdir=a', '--mode=evaluate', '--config.keep.rat=1'], 'unknown key config.keep.rat: did you mean'),
    (['--config=mine.py', '--workdir=a', '--out=b.json'], '--out=b.json is for --mode=evaluate')])
def test_main_with_incompatible_flags_exits_with_an_error(start_main, tmp_path, capsys, words, message):
    (tmp_path / 'mine.py').write_text('from configs import base\nget_config = base.get_config\n')
    assert start_main(*words) == {'code': 2}
    assert message in capsys.readouterr().err


def test_benchmark_with_a_plan_that_names_a_reducer_measures_it_with_that_reducer_alone():
    lists = {'names': ['vit_layouts'], 'rates': [1.0], 'fuse': [True], 'batch_sizes': [1], 'dtypes': ['float32'],
             'reducers': ['evit', 'random']}
    *_, case = cases = combine_lists(**lists, plans=[SEARCHED._replace(architecture='')])
    assert len(cases) == 2 and case.plan == SEARCHED.plan()
    assert str(case) == ('vit_layouts 12-8 at (0, 1), dropping 2-1, merged, prune_merge:mean, 16 px, batch 1, float32')


def test_benchmark_with_a_plan_adds_its_cases_to_those_of_the_rates():
    lists = {'names': ['vit_layouts'], 'rates': [1.0, 0.5], 'fuse': [True], 'batch_sizes': [1, 2],
             'dtypes': ['float32']}
    cases = combine_lists(**lists, plans=[PLAN_FILE])
    assert [str(case) for case in cases[-2:]] == [
        f'vit_layouts 9-5 at (0, 1) not fused, 16 px, batch {batch}, float32' for batch in (1, 2)]
    assert len(cases) == 6 and cases[-1].plan == PLAN and cases[-1].dense in cases
    with pytest.raises(ValueError, match=r'is for vit_layouts with 16 patches .*, and this is deit_s'):
        combine_lists(**lists | {'names': ['deit_s']}, plans=[PLAN_FILE])
