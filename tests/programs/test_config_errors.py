"""Wrong words about a config: one line names what is unknown, the nearest, and what there is."""

import sys

import pytest
from absl import flags
from ml_collections import config_flags

from configs import base
from evit_jax import cli, config_errors
from tests.helpers import layouts

DIGITS = '--config=configs/digits.py'
GROUP = r'config.keep has levels, macs, rate, rates, shrink_epochs, start_epoch, tokens'


@pytest.fixture(autouse=True)
def checkout(monkeypatch):
    monkeypatch.chdir(layouts.ROOT)
    monkeypatch.delitem(sys.modules, 'config_config', raising=False)  # a module of this name is reloaded in place


def check(*words):
    defined = flags.FlagValues()
    config_flags.DEFINE_config_file('config', flag_values=defined, sys_argv=['program', *words])
    config_errors.check(['program', *words], defined)
    return defined


@pytest.mark.parametrize(('words', 'said'), [
    (['--config.keep.ratio=0.5'], rf'unknown key config.keep.ratio: did you mean config.keep.rate or .*\? {GROUP}'),
    (['--config.keep.xyzzy=0.5'], rf'unknown key config.keep.xyzzy: {GROUP}'),
    (['--config.keep.xyzzy', '0.5'], rf'unknown key config.keep.xyzzy: {GROUP}'),
    (['--noconfig.model.fus'], r'unknown key config.model.fus: did you mean config.model.fuse\? config.model has'),
    (['--config.kep.rate=1'], r'unknown key config.kep: did you mean config.keep\? config has batch_size, '),
    (['--config.rate=1'], r'unknown key config.rate: did you mean .*config.keep.rate\?'),
    (['--config.keep.rate.x=1'], r'config.keep.rate is a value, and has no key .x.: give --config.keep.rate='),
    (['--config.data=3'], r'config.data is a group of keys and no value: give one of them, as --config.data.*path'),
    (['--config.keep.rate=abc'], r'--config.keep.rate=abc is not a number; the config has 0.7'),
    (['--config.optimizer.lr=nan'], r'--config.optimizer.lr=nan is not a number; the config has 0.006'),
    (['--config.epochs=1.5'], r'--config.epochs=1.5 is not a whole number; the config has 18'),
    (['--config.model.fuse=maybe'], r'--config.model.fuse=maybe is not true or false; the config has True'),
    (['--config.keep.rates=abc'], r'--config.keep.rates=abc is not a list of numbers, as 0.9,0.7')])
def test_a_wrong_override_is_named_with_what_is_meant(words, said):
    with pytest.raises(ValueError, match=said):
        check(DIGITS, *words)


@pytest.mark.parametrize(('file', 'said'), [
    ('digits', r'--config=digits is no file: did you mean configs/digits.py\? there are configs/base.py, '),
    ('configs/digit.py', r'digit.py is no file: did you mean configs/digits.py\?'),
    ('configs', r'--config=configs is a folder: there are configs/base.py'), ('', r'--config= is no file')])
def test_a_missing_config_file_is_named_with_the_nearest_and_all_there_are(file, said):
    for words in ([f'--config={file}'], ['--config', file], [f'--config={file}', '--config.keep.rate=0.5']):
        with pytest.raises(FileNotFoundError, match=said):
            check(*words)


@pytest.mark.parametrize(('text', 'said'), [
    ('1 +', r'mine.py fails: SyntaxError: invalid syntax \(mine.py, line 1\)'),
    ('', 'fails: AttributeError: .*get_config'),
    ('from configs import base\ndef get_config():\n  config = base.get_config()\n  config.keep.ratio = 1', 'ratio'),
    ('from configs import base\ndef get_config():\n  base.get_config().keep.update(ratio=1)', 'ratio')])
def test_a_config_file_that_fails_is_named_in_one_line(tmp_path, text, said):
    (tmp_path / 'mine.py').write_text(text)
    with pytest.raises(ValueError, match=said) as refusal:
        check(f'--config={tmp_path / "mine.py"}')
    assert '\n' not in str(refusal.value)


@pytest.mark.parametrize(('body', 'said'), [
    ('ConfigDict({"batch_size": 5})', r'lacks config.checkpoint, .*config.data, .*config.seed, .*: begin with'),
    ('{"batch_size": 5}', r'mine.py: get_config\(\) returns dict and not ConfigDict: begin with'),
    ('5', r'get_config\(\) returns int and not ConfigDict'),
    ('without("data", "mean")', 'mine.py lacks config.data.mean: begin with'),
    ('ConfigDict({"run": without("keep", "rate")})', 'mine.py lacks config.run.keep.rate: begin with')])
def test_a_config_without_all_keys_is_refused_with_the_missing_ones(tmp_path, body, said):
    (tmp_path / 'mine.py').write_text(
        'from configs import base\nfrom ml_collections import ConfigDict\n\n'
        'def without(group, key):\n    config = base.get_config()\n    with config.unlocked():\n'
        f'        del config[group][key]\n    return config\n\ndef get_config():\n    return {body}\n')
    with pytest.raises(ValueError, match=said):
        check(f'--config={tmp_path / "mine.py"}')


def test_all_recipes_have_the_keys_of_the_base_config():
    for file in sorted((layouts.ROOT / 'configs').glob('[!_]*.py')):
        check(f'--config={file}')


def test_a_config_in_a_flag_file_takes_overrides_of_the_command_line(tmp_path, monkeypatch):
    (file := tmp_path / 'f').write_text('# mine\n--config=configs/digits.py\n--config.seed=7\n')
    check(f'--flagfile={file}', '--config.keep.rate=0.5')
    check('--flagfile', str(file), '--config.keep.rate=0.5')
    with pytest.raises(ValueError, match=r'unknown key config.keep.ratio'):
        check(f'--flagfile={file}', '--config.keep.ratio=0.5')
    with pytest.raises(ValueError, match='--config is given twice'):
        check(f'--flagfile={file}', DIGITS)


def test_two_configs_and_json_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'--config is given twice, as configs/digits.py and as configs/deit_s.py: '):
        check(DIGITS, '--config=configs/deit_s.py', '--config.batch_size=8')
    (file := tmp_path / 'config.json').write_text('{"model.fuse": false}')
    with pytest.raises(ValueError, match=r'config.json is JSON, .* configs/\*.py'):
        check(f'--config={file}')


def test_an_override_before_the_config_is_refused():
    with pytest.raises(ValueError, match=r'--config.keep.rate=0.5 stands before --config: give --config=\S+ first'):
        check('--config.keep.rate=0.5', DIGITS)
    with pytest.raises(ValueError, match=r'--config.keep.rate=0.5 changes a config: give --config FILE before it'):
        check('--config.keep.rate=0.5')


def test_right_overrides_pass_and_reach_the_config():
    words = [DIGITS, '--config.keep.rates=(0.9, 0.8,0.7)', '--config.keep.tokens', '3', '--noconfig.model.fuse',
             '--config.data.crop=()', '--config.model.name=deit_s', '--config.seed=7']
    check(DIGITS, '--', '--config.x=1')
    defined = check(*words)
    defined(['program', *words])
    config = defined['config'].value
    assert (config.keep.rates, config.keep.tokens, config.model.fuse) == ((0.9, 0.8, 0.7), (3,), False)
    assert (config.data.crop, config.model.name, config.seed) == ((), 'deit_s', 7)


def test_an_unknown_flag_is_named_with_the_nearest_and_the_flags_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(flags, 'FLAGS', defined := flags.FlagValues())
    flags.DEFINE_string('workdir', None, 'Folder.', flag_values=defined, module_name='program')
    for word, hint in (('--workdr=x', 'did you mean --workdir? '), ('--xyzzy', '')):
        monkeypatch.setattr(sys, 'argv', ['program', word])
        with pytest.raises(SystemExit):
            cli.run(lambda: None)
        assert f'unknown flag {word.split("=")[0]}: {hint}this program has --workdir\n' in capsys.readouterr().err


def test_base_config_is_locked():
    with pytest.raises(KeyError, match='ratio'):
        base.get_config().keep.update(ratio=0.5)
