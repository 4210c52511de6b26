"""The commands on the pages of the documentation: programs, flags, configs, operands, make targets, extras."""

import ast
import collections
import importlib.util
import pathlib
import re
import sys
import tomllib

import pytest
from absl.testing import flagsaver

from evit_jax import cli
from evit_jax.__main__ import programs
from tests.helpers import pages, program_modules
from tests.helpers.stand_ins import Cloud, printed

MODES = {'train': [], 'evaluate': ['--mode=evaluate'], 'knn': ['--mode=knn']}


def program_and_words(words):
    """Returns the program and the arguments of a command of the package; None for another command."""
    if words[:2] == ['python', '-m'] and words[2].startswith('evit_jax.'):
        return words[2].removeprefix('evit_jax.'), words[3:]
    rest = words[1:] if words[0] == 'evit' else words[3:] if words[:3] == ['python', '-m', 'evit_jax'] else []
    if not rest or rest[0].startswith('-'):
        return None
    return ('main', MODES[rest[0]] + rest[1:]) if rest[0] in MODES else (rest[0], rest[1:])


ALL = [(page, words) for page in pages.PAGES for words in pages.commands(page)]
BY_PROGRAM = collections.defaultdict(list)
for _page, _words in ALL:
    if _command := program_and_words(_words):
        BY_PROGRAM[_command[0]].append((_page.name, _command[1]))


def starting_with(first):
    return [(page.name, words[1:]) for page, words in ALL if words[0] == first]


def check(module, words):
    """Runs the `main` part of a program, with a function that does nothing in place of the program itself."""
    def run(program, *operands):
        def nothing(*words):
            calls.append(words)

        original(dict.fromkeys(program, nothing) if isinstance(program, dict) else nothing, *operands)

    calls, original = [], cli.run
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        words = ['--config=digits' if word == '--config=CONFIG' else word for word in words]
        patch.setattr(sys, 'argv', [module.__name__, *words])
        patch.setattr(cli, 'configure_logging', lambda: None)
        patch.setattr(cli, 'run', run)
        patch.chdir(pages.ROOT)
        if hasattr(module, 'run'):
            module.run()
        else:
            call, = (node for node in ast.walk(ast.parse(pathlib.Path(module.__file__).read_text()))
                     if isinstance(node, ast.Call) and ast.unparse(node.func) == 'cli.run')
            eval(ast.unparse(call), vars(module))
    return len(calls) == 1


def test_pages_have_commands_of_the_main_programs():
    assert {'main', 'predict', 'plan', 'export', 'benchmark', 'visualize', 'describe', 'convert', 'compare',
            'label'} <= BY_PROGRAM.keys() <= {*programs(), 'main'}


@pytest.mark.parametrize('program', sorted(BY_PROGRAM))
def test_commands_of_a_program_have_valid_flags_configs_and_operands(program, capsys):
    with program_modules.load(program) as module:
        for page, words in BY_PROGRAM[program]:
            try:
                assert check(module, words)
            except SystemExit:
                pytest.fail(f'{page}: evit_jax.{program} {" ".join(words)}: {capsys.readouterr().err}')


def test_make_commands_have_targets():
    targets = set(re.findall(r'^([a-z-]+):', (pages.ROOT / 'Makefile').read_text(), re.MULTILINE))
    for page, words in starting_with('make'):
        assert {word for word in words if '=' not in word} <= targets, (page, words)


def test_pip_commands_name_extras_of_the_project():
    extras = tomllib.loads((pages.ROOT / 'pyproject.toml').read_text())['project']['optional-dependencies']
    named = {extra for _, words in starting_with('pip') for word in words
             for extra in ''.join(re.findall(r'\[(.*)\]', word)).split(',') if extra and not word.startswith('jax')}
    assert named and named <= extras.keys()


@pytest.mark.parametrize('words', [words for _, words in ALL if words[0].startswith('launch/')], ids=' '.join)
def test_launch_commands_can_be_printed(words, tmp_path):
    assert printed(Cloud(tmp_path).run(words[0].removeprefix('launch/'), *words[1:], '--dry-run'))


def drawing_script(name):
    spec = importlib.util.spec_from_file_location(name, pages.DOCS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_of_the_drawing_script_are_parsed():
    module = drawing_script('draw_tokens')
    lines = [words for _, words in starting_with('python') if words[:2] == ['-m', 'docs.draw_tokens']]
    assert lines and all(module.parse_args(words[2:]).out for words in lines)


def test_drawing_of_the_methods_has_all_values_of_the_table():
    module = drawing_script('draw_training_free')
    methods = module.read_table((pages.DOCS / 'training_free.md').read_text())
    errors, accuracies = module.draw(methods).axes
    assert all(len(values) == 3 for name, columns in methods.items() for column, values in columns.items()
               if name != 'dense' and column != 'blocks')
    assert len(errors.lines) == len(methods) - 1 and len(accuracies.lines) == len(methods)
    assert errors.lines[0].get_ydata().tolist() == methods['searched plan']['error'] == [0.30, 1.36, 5.58]


@pytest.mark.parametrize('line', ['python -m evit_jax.predict runs/digits', 'evit predict runs/digits a.png --rte=1',
                                  'evit train --config digit --workdir x', 'evit plan --data photos/ more'])
def test_check_of_a_wrong_command_fails(line, capsys):
    program, words = program_and_words(line.split())
    with program_modules.load(program) as module, pytest.raises(SystemExit):
        check(module, words)
