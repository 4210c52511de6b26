"""A plan in a file: written, read, refused, and what main makes of it, and of its other flags."""

import contextlib
import json
import sys

import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile, read_plan_file
from evit_jax.runtime import distributed
from evit_jax.training import checks, experiment, loop, model_setup
from tests.helpers import layouts, program_modules
from tests.helpers.benchmarks import combine_lists

least, main = layouts.least, program_modules.module_fixture('main')
PLAN = make_plan(16, 2, tokens=(9, 5), reduce_at=(0, 1), fuse=False)
PLANNED = PlanFile.of(PLAN, 'vit_layouts', 16)


def write(file, planned=PLANNED):
    file.write_text(json.dumps(planned.metadata() | {'machine': {}, 'target': '2x'}))
    return file


def test_what_was_written_is_read(tmp_path):
    file = write(tmp_path / 'plan.json')
    assert read_plan_file(file) == PLANNED._replace(path=str(file))
    assert PlanFile.of(make_plan(16, 2, rate=1.0, reduce_at=(1,)), 'a', 16).tokens == ()


@pytest.mark.parametrize('text, said', [
    (None, 'cannot be read .No such file'), ('{', 'holds no plan .Expecting'), ('[]', 'holds no plan'),
    ('{"model": "deit_s"}', 'holds no plan .*missing'),
    (json.dumps(PLANNED._replace(reduce_at=(0, 7)).metadata()), 'block 7 is outside'),
    (json.dumps(PLANNED._replace(tokens=()).metadata()), r'tokens=\(\) has 0 values for 2 reductions'),
    (json.dumps(PLANNED.metadata() | {'tokens': {'9': 0, '5': 1}}), 'is a dict'),
    (json.dumps(PLANNED.metadata() | {'fuse': 'false'}), '"fuse": "false" is neither true nor false')])
def test_what_is_no_plan_is_refused(tmp_path, text, said):
    if text is not None:
        (tmp_path / 'plan.json').write_text(text)
    with pytest.raises(ValueError, match=f'--plan=.*{said}.*python -m evit_jax.plan --out FILE'):
        read_plan_file(tmp_path / 'plan.json')


def test_a_plan_for_another_model_names_both():
    with pytest.raises(ValueError, match=r'p.json is for vit_layouts with 16 patches and 2 blocks, and this is '
                                         r'deit_s with 196 patches and 12 blocks: make one with .* --model=deit_s'):
        PLANNED._replace(path='p.json').check('deit_s', 196, 12)


def test_main_trains_and_evaluates_by_the_plan_whatever_the_config_says(main, tmp_path, monkeypatch):
    seen, file = [], write(tmp_path / 'plan.json')
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)
    monkeypatch.setattr(distributed, 'distributed', lambda agreed: contextlib.nullcontext())
    monkeypatch.setattr(loop, 'train', lambda config, workdir, accept_changes: seen.append(config))
    monkeypatch.setattr(loop, 'evaluate_workdir', lambda config, workdir, planned, **_: seen.append(
        model_setup.apply_plan(config, planned)))
    (tmp_path / 'recipe.py').write_text(
        'from tests.helpers import layouts\n'
        'def get_config():\n'
        '    config = layouts.config_of(keep__macs=0.7, keep__rates=(0.5,), keep__tokens=(3,))\n'
        '    return config.lock()\n')
    for mode in ('train', 'evaluate'):
        monkeypatch.setattr(sys, 'argv', ['main', f'--config={tmp_path / "recipe.py"}', f'--workdir={tmp_path}',
                                          f'--plan={file}', f'--mode={mode}'])
        with flagsaver.flagsaver():
            cli.run(main.main)
    assert len(seen) == 2 and seen[0].is_locked
    for config in seen:
        checks.check(config)
        assert experiment.setup(config).plan == PLAN


@pytest.mark.parametrize('changes', [{'keep__rate': 0.2}, {'keep__macs': 0.5}, {'model__reduce_at': (1,)}])
def test_follow_refuses_explicit_keys_that_the_plan_replaces(changes):
    config, key = layouts.config_of(**changes), next(iter(changes)).replace('__', '.')
    with pytest.raises(ValueError, match=rf'give only one of --plan=\S* and --config.{key}='):
        model_setup.apply_plan(config, PLANNED, [key])
    same = layouts.config_of(model__fuse=PLANNED.fuse)
    applied = model_setup.apply_plan(same, PLANNED, ['model.fuse', 'keep.rates', 'batch_size'])
    assert applied.keep.tokens == PLANNED.tokens


@pytest.fixture
def handed_on(main, tmp_path, monkeypatch):
    """Starts main as a program; gives the arguments of the evaluation that it begins, and its exit code."""
    monkeypatch.setattr(cli, 'configure_logging', lambda: None)
    monkeypatch.setattr(distributed, 'distributed', lambda agreed: contextlib.nullcontext())
    monkeypatch.chdir(tmp_path)

    def start(*words):
        found = {}
        monkeypatch.setattr(loop, 'evaluate_workdir', lambda config, workdir, **more: found.update(
            more, config=config, workdir=workdir))
        monkeypatch.setattr(sys, 'argv', ['main', *words])
        with flagsaver.flagsaver():
            try:
                main.run()
            except SystemExit as end:
                found['code'] = end.code
        return found

    return start


def test_main_evaluates_a_workdir_without_a_config_and_parses_what_is_set(handed_on):
    found = handed_on('--mode=evaluate', '--workdir=runs/a', '--config.keep.rate=0.5', '--config.data.mean=(1,2,3)',
                      '--out=b.json')
    assert (found['workdir'], found['from_file'], found['out']) == ('runs/a', False, 'b.json')
    assert sorted(found['explicit']) == ['data.mean', 'keep.rate']
    assert (found['config'].keep.rate, found['config'].data.mean) == (0.5, (1, 2, 3))


def test_main_evaluates_with_a_config_file_and_what_is_set_on_the_command_line(handed_on, tmp_path):
    (tmp_path / 'mine.py').write_text('from configs import base\nget_config = base.get_config\n')
    found = handed_on('--config=mine.py', '--mode=evaluate', '--workdir=runs/a', '--config.seed=3')
    assert found['from_file'] and [*found['explicit']] == ['seed']


@pytest.mark.parametrize('words, message', [
    (['--mode=evaluate'], 'give both --config FILE and --workdir DIR'), (['--workdir=a'], 'give both --config FILE'),
    (['--workdir=a', '--mode=evaluate', '--config.keep.rat=1'], 'unknown key config.keep.rat: did you mean'),
    (['--config=mine.py', '--workdir=a', '--out=b.json'], '--out=b.json is for --mode=evaluate')])
def test_main_refuses_flags_that_do_not_go_together(handed_on, tmp_path, capsys, words, message):
    (tmp_path / 'mine.py').write_text('from configs import base\nget_config = base.get_config\n')
    assert handed_on(*words) == {'code': 2}
    assert message in capsys.readouterr().err


def test_the_benchmark_measures_a_plan_beside_the_rates():
    asked = {'names': ['vit_layouts'], 'rates': [1.0, 0.5], 'fuse': [True], 'batch_sizes': [1, 2],
             'dtypes': ['float32']}
    found = combine_lists(**asked, plans=[PLANNED])
    assert [str(case) for case in found[-2:]] == [
        f'vit_layouts 9-5 at (0, 1) not fused, 16 px, batch {batch}, float32' for batch in (1, 2)]
    assert len(found) == 6 and found[-1].plan == PLAN and found[-1].dense in found
    with pytest.raises(ValueError, match=r'is for vit_layouts with 16 patches .*, and this is deit_s'):
        combine_lists(**asked | {'names': ['deit_s']}, plans=[PLANNED])
