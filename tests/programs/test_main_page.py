"""The commands `evit` and `python -m evit_jax`, which list the programs or run one of them."""

import subprocess
import sys

import pytest

from evit_jax.__main__ import main, programs
from tests.helpers import layouts


def start(*words):
    return subprocess.run([sys.executable, '-m', 'evit_jax', *words], capture_output=True, text=True, cwd=layouts.ROOT)


def test_main_without_words_lists_every_program_with_a_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [*programs()]
    assert {'train', 'evaluate', 'predict', 'visualize', 'export', 'label', 'convert', 'plan'} <= {*programs()}
    assert all(line for line in programs().values()) and not {'cli', '__main__', 'main'} & {*programs()}
    assert not any('python -m' in line for line in programs().values())


def test_main_unknown_program_returns_2_with_the_nearest(capsys):
    assert main(['predcit', '--json']) == 2
    assert "unknown program 'predcit': did you mean predict? there are train, evaluate, " in capsys.readouterr().err


def test_main_help_lists_the_programs(capsys):
    assert main(['--help']) == 0
    assert '  predict ' in capsys.readouterr().out


@pytest.mark.parametrize(('program', 'usage'), [
    pytest.param('predict', 'python -m evit_jax predict runs/digits', marks=pytest.mark.slow),
    ('train', 'python -m evit_jax train --config digits --workdir runs/digits\n'
     'Evaluates: python -m evit_jax evaluate --workdir runs/digits')])
def test_package_program_help_shows_the_command_that_was_used(program, usage):
    done = start(program, '--help')
    assert done.returncode == 0 and usage in done.stdout, done.stderr


def test_package_evaluate_passes_the_mode_and_the_flags(tmp_path):
    done = start('evaluate', f'--workdir={tmp_path}', '--config.keep.rate=0.5')
    assert done.returncode == 2 and done.stderr.endswith('train first, or give the right --workdir\n'), done.stderr


@pytest.mark.slow
def test_package_train_without_a_config_exits_with_the_flags_to_give():
    done = start('train', '--workdir=x')
    assert done.returncode == 2 and 'error: give both --config FILE and --workdir DIR' in done.stderr
