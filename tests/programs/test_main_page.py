"""python -m evit_jax: the list of the programs."""

import subprocess
import sys

from evit_jax.__main__ import main, programs
from tests.helpers import layouts


def test_every_program_has_a_line(capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [*programs()]
    assert {'main', 'predict', 'visualize', 'export', 'label', 'convert', 'plan'} <= {*programs()}
    assert all(line for line in programs().values()) and not {'cli', '__main__'} & {*programs()}


def test_the_package_as_a_program_helps_and_refuses_other_words():
    start, how = [sys.executable, '-m', 'evit_jax'], {'capture_output': True, 'text': True, 'cwd': layouts.ROOT}
    done = subprocess.run([*start, '--help'], **how)
    assert done.returncode == 0 and '  predict ' in done.stdout
    done = subprocess.run([*start, 'predict'], **how)
    assert done.returncode == 2 and 'as python -m evit_jax.predict' in done.stderr
