"""Mistakes in --config and --config.key: one line names the mistake, the nearest name, and all names."""

import re
import sys

import pytest
from absl import flags
from ml_collections import config_flags

from evit_jax import cli, config_errors
from evit_jax.configs import base
from tests.helpers import layouts

DIGITS = '--config=configs/digits.py'
GROUP = r'config.keep has drop, levels, macs, rate, rates, shrink_epochs, start_epoch, tokens'


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    monkeypatch.chdir(layouts.ROOT)
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # a module of this name is reloaded in place


def resolve(*words):
    defined = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=defined, sys_argv=['program', *words])
    return defined, config_errors.resolve(['program', *words], defined)


@pytest.mark.parametrize(('words', 'message'), [
    (['--config.keep.ratio=0.5'], rf'unknown key config.keep.ratio: did you mean config.keep.rate or .*\? {GROUP}'),
    (['--config.keep.xyzzy=0.5'], rf'unknown key config.keep.xyzzy: {GROUP}'),
    (['--config.keep.xyzzy', '0.5'], rf'unknown key config.keep.xyzzy: {GROUP}'),
    (['--noconfig.model.fus'], r'unknown key config.model.fus: did you mean config.model.fuse\? config.model has'),
    (['--config.kep.rate=1'], r'unknown key config.kep: did you mean config.keep\? config has base_model, '),
    (['--config.rate=1'], r'unknown key config.rate: did you mean .*config.keep.rate\?'),
    (['--config.keep.rate.x=1'], r'config.keep.rate is a value, and has no key .x.: give --config.keep.rate='),
    (['--config.data=3'], r'config.data is a group of keys and no value: give one of them, as --config.data.*path'),
    (['--config.keep.rate=abc'], r'--config.keep.rate=abc is not a number; the config has 0.7'),
    (['--config.optimizer.lr=nan'], r'--config.optimizer.lr=nan is not a number; the config has 0.006'),
    (['--config.epochs=1.5'], r'--config.epochs=1.5 is not a whole number; the config has 18'),
    (['--config.model.fuse=maybe'], r'--config.model.fuse=maybe is not true or false; the config has True'),
    (['--config.keep.rates=abc'], r'--config.keep.rates=abc is not a list of numbers, as 0.9,0.7')])
def test_resolve_wrong_override_raises_with_a_hint(words, message):
    with pytest.raises(ValueError, match=message):
        resolve(DIGITS, *words)


@pytest.mark.parametrize('text', ['EViT,ToMe', 'EViT, not fused', '(1, 2)', '3', "{'EViT'}", "'EViT'"])
def test_resolve_wrong_list_of_names_raises_with_an_example(text):
    with pytest.raises(ValueError, match=rf"methods={re.escape(text)} is not a list of names, as \"\('EViT','ToMe'\)"):
        resolve('--config=compare_digits', f'--config.scratch.methods={text}')


def test_resolve_accepts_names_for_an_empty_list_of_a_comparison(tmp_path):
    recipe = tmp_path / 'mine.py'
    recipe.write_text('from evit_jax.configs import compare_digits\n\ndef get_config():\n'
                      '    config = compare_digits.get_config().unlock()\n    config.scratch.methods = ()\n'
                      '    return config.lock()\n')
    defined, arguments = resolve(f'--config={recipe}', "--config.scratch.methods=('EViT',)")
    defined(arguments)
    assert defined['config'].value.scratch.methods == ('EViT',)
    with pytest.raises(ValueError, match='is not a list of numbers'):
        resolve(f'--config={recipe}', '--config.run.keep.rates=abc')


def test_resolve_accepts_a_list_of_names():
    defined, arguments = resolve('--config=compare_digits', "--config.scratch.methods=('EViT, not fused','ToMe')",
                                 '--config.untrained.methods=()')
    defined(arguments)
    assert defined['config'].value.scratch.methods == ('EViT, not fused', 'ToMe')
    assert defined['config'].value.untrained.methods == ()


@pytest.mark.parametrize(('file', 'message'), [
    ('digit', r'--config=digit is no file and no recipe: did you mean digits\? the recipes are base, compare_digits, '),
    ('configs/digit.py', r'digit.py is no file and no recipe: did you mean digits\?'),
    ('configs', r'--config=configs is a folder: the recipes are base, '), ('', r'--config= is no file')])
def test_resolve_missing_config_raises_with_the_nearest_and_all_recipes(file, message):
    for words in ([f'--config={file}'], ['--config', file], [f'--config={file}', '--config.keep.rate=0.5']):
        with pytest.raises(FileNotFoundError, match=message):
            resolve(*words)


@pytest.mark.parametrize(('text', 'message'), [
    ('1 +', r'mine.py fails: SyntaxError: invalid syntax \(mine.py, line 1\)'),
    ('', 'fails: AttributeError: .*get_config'),
    ('from configs import base\ndef get_config():\n  config = base.get_config()\n  config.keep.ratio = 1', 'ratio'),
    ('from configs import base\ndef get_config():\n  base.get_config().keep.update(ratio=1)', 'ratio')])
def test_resolve_config_that_fails_raises_one_line(tmp_path, text, message):
    (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(ValueError, match=message) as refusal:
        resolve(f'--config={tmp_path / "mine.py"}')
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(('body', 'message'), [
    ('ConfigDict({"batch_size": 5})', r'lacks config.seed, .*config.data, .*config.checkpoint: start from'),
    ('{"batch_size": 5}', r'mine.py: get_config\(\) returns dict and not ConfigDict: start from'),
    ('5', r'get_config\(\) returns int and not ConfigDict'),
    ('without("data", "mean")', 'mine.py lacks config.data.mean: start from'),
    ('ConfigDict({"run": without("keep", "rate")})', 'mine.py lacks config.run.keep.rate: start from')])
def test_resolve_config_without_all_keys_raises_with_the_missing_keys(tmp_path, body, message):
    (tmp_path / 'mine.py').write_text(
        'from configs import base\nfrom ml_collections import ConfigDict\n\n'
        'def without(group, key):\n    config = base.get_config()\n    with config.unlocked():\n'
        f'        del config[group][key]\n    return config\n\ndef get_config():\n    return {body}\n')
    with pytest.raises(ValueError, match=message):
        resolve(f'--config={tmp_path / "mine.py"}')


def test_resolve_accepts_every_recipe_by_file_and_by_name(tmp_path, monkeypatch):
    files = sorted((layouts.ROOT / 'configs').glob('[!_]*.py'))
    monkeypatch.chdir(tmp_path)
    for file in files:
        for words in ([f'--config={file}'], [f'--config={file.stem}'], ['--config', file.stem]):
            defined, arguments = resolve(*words)
            assert f'{file}' in ' '.join(arguments) and len(arguments) == len(words) + 1
    defined(arguments)
    assert defined['config'].value.model.name == 'lvvit_s'
    assert config_errors.recipes() == [file.stem for file in files]


def test_resolve_file_of_a_recipes_name_takes_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'digits').write_text('')
    with pytest.raises(ValueError, match='--config=digits fails'):
        resolve('--config=digits')


@pytest.mark.parametrize('package', ['configs', 'evit_jax.configs'])
def test_resolve_copied_recipe_imports_the_base_config(tmp_path, package):
    (file := tmp_path / 'mine.py').write_text(f'from {package} import base\nget_config = base.get_config\n')
    defined, arguments = resolve(f'--config={file}', '--config.seed=7')
    defined(arguments)
    assert defined['config'].value.seed == 7


def test_resolve_config_in_a_flag_file_accepts_overrides_on_the_command_line(tmp_path):
    (file := tmp_path / 'f').write_text('# mine\n--config=configs/digits.py\n--config.seed=7\n')
    resolve(f'--flagfile={file}', '--config.keep.rate=0.5')
    resolve('--flagfile', str(file), '--config.keep.rate=0.5')
    with pytest.raises(ValueError, match=r'unknown key config.keep.ratio'):
        resolve(f'--flagfile={file}', '--config.keep.ratio=0.5')
    with pytest.raises(ValueError, match='--config is given twice'):
        resolve(f'--flagfile={file}', DIGITS)


def test_resolve_two_configs_or_json_raises(tmp_path):
    with pytest.raises(ValueError, match=r'--config is given twice, as configs/digits.py and as configs/deit_s.py: '):
        resolve(DIGITS, '--config=configs/deit_s.py', '--config.batch_size=8')
    (file := tmp_path / 'config.json').write_text('{"model.fuse": false}')
    with pytest.raises(ValueError, match=r'config.json is JSON, .* configs/\*.py'):
        resolve(f'--config={file}')


def test_resolve_override_before_the_config_raises():
    with pytest.raises(ValueError, match=r'--config.keep.rate=0.5 stands before --config: give --config=\S+ first'):
        resolve('--config.keep.rate=0.5', DIGITS)
    with pytest.raises(ValueError, match=r'--config.keep.rate=0.5 changes a config: give --config FILE before it'):
        resolve('--config.keep.rate=0.5')


def test_resolve_correct_overrides_reach_the_config():
    words = [DIGITS, '--config.keep.rates=(0.9, 0.8,0.7)', '--config.keep.tokens', '3', '--noconfig.model.fuse',
             '--config.data.crop=()', '--config.model.name=deit_s', '--config.seed=7']
    resolve(DIGITS, '--', '--config.x=1')
    defined, arguments = resolve(*words)
    defined(arguments)
    config = defined['config'].value
    assert (config.keep.rates, config.keep.tokens, config.model.fuse) == ((0.9, 0.8, 0.7), (3,), False)
    assert (config.data.crop, config.model.name, config.seed) == ((), 'deit_s', 7)


def test_run_unknown_flag_prints_the_nearest_and_all_flags_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(flags, 'FLAGS', defined := flags.FlagValues())
    flags.DEFINE_string('workdir', None, 'Folder.', flag_values=defined, module_name='program')
    for word, hint in (('--workdr=x', 'did you mean --workdir? '), ('--xyzzy', '')):
        monkeypatch.setattr(sys, 'argv', ['program', word])
        with pytest.raises(SystemExit):
            cli.run(lambda: None)
        assert f'unknown flag {word.split("=")[0]}: {hint}this program has --workdir\n' in capsys.readouterr().err


def test_get_config_unknown_key_raises():
    with pytest.raises(KeyError, match='ratio'):
        base.get_config().keep.update(ratio=0.5)
