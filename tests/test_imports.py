"""The order of the house: which part of the package may import which."""

import ast
import pathlib
import subprocess
import sys

import pytest

import evit_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'evit_jax'
MAY_IMPORT = {  # package -> packages that it may import beside itself
    'configs': set(), 'runtime': set(), 'reduction': {'configs', 'runtime'}, 'models': {'runtime', 'reduction'},
    'viz': set(), 'data': {'runtime'}, 'metrics': {'runtime'},
    'checkpoints': {'configs', 'runtime', 'reduction', 'models', 'data', 'metrics'}}
MAY_IMPORT['training'] = {*MAY_IMPORT, 'viz'}
MAY_IMPORT['interchange'] = {'runtime', 'reduction', 'models', 'checkpoints'}
for _above in ('inference', 'serving', 'comparison', 'benchmarks', 'planning'):
    MAY_IMPORT[_above] = set(MAY_IMPORT)
MAY_IMPORT |= {'config_errors': {'configs', 'runtime'}, 'cli': {'config_errors'}}
HEAVY = {'tensorflow', 'torch', 'torchvision', 'timm', 'keras', 'clu'}  # clu.metric_writers imports TensorFlow
LIGHT = {'clu.metrics.Average', 'clu.parameter_overview'}  # these modules of clu import without it


def imports_of(source, module=''):
    """Every dotted name that a file imports, at its top or within, and whether it stands in a `try` of a function."""
    found = []

    def visit(node, in_function, guarded):
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.Import):
            found.extend((alias.name, guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split('.')[:-node.level] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            found.extend((f'{base}.{alias.name}', guarded) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in ('import_module', '__import__'):
            found.append((node.args[0].value if isinstance(node.args[0], ast.Constant) else '?', guarded))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, guarded or (in_function and isinstance(node, ast.Try)))

    visit(ast.parse(source), False, False)
    return found


def files_of(folder):
    return sorted(folder.rglob('*.py'))


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports_in(path):
    return imports_of(path.read_text(), name_of(path))


def part_of(name):
    """The room or door that a dotted name of ours belongs to."""
    return (name.split('.') + [''])[1]


def parts():
    """(part, file) of all files below the package's own __init__."""
    return [(part_of(name_of(path)), path) for path in files_of(PACKAGE) if path != PACKAGE / '__init__.py']


@pytest.mark.parametrize('source, names', [
    ('import torch', ['torch']), ('import a.b as c, d', ['a.b', 'd']), ('from a import b, c', ['a.b', 'a.c']),
    ('def f():\n  from a.b import c', ['a.b.c']), ('from . import b', ['evit_jax.data.b']),
    ('from ..models import b', ['evit_jax.models.b']), ('importlib.import_module("torch.nn")', ['torch.nn'])])
def test_walk_finds_imports_of_every_form(source, names):
    assert [name for name, _ in imports_of(source, 'evit_jax.data.x')] == names


def test_walk_tells_guarded_imports_from_others():
    guard = 'try:\n    import a\n  except ImportError: pass'
    assert imports_of(f'def f():\n  {guard}') == [('a', True)]
    assert imports_of('def f():\n  import a') == [('a', False)]
    assert imports_of('try:\n  import a\nexcept ImportError: pass') == [('a', False)]


def test_every_room_has_a_place_in_the_order():
    folders = {part for part, path in parts() if path.parent != PACKAGE}
    assert folders | {'config_errors', 'cli', 'configs'} == set(MAY_IMPORT)


def test_imports_point_down_and_doors_do_not_import_each_other():
    wrong = []
    for part, path in parts():
        allowed = {part} | MAY_IMPORT.get(part, set(MAY_IMPORT))
        for name, _ in imports_in(path):
            if name.split('.')[0] == 'evit_jax' and part_of(name) not in allowed:
                wrong.append(f'{path.relative_to(ROOT)} imports {name}')
    assert not wrong
    assert {'main', 'benchmark', 'convert', 'describe'} <= {part for part, _ in parts()} - set(MAY_IMPORT)


def test_package_itself_imports_its_names_at_their_first_use():
    assert [name for name, _ in imports_in(PACKAGE / '__init__.py')] == ['importlib', 'typing.Any', '?']
    for module in set(evit_jax._MODULES.values()):
        assert (PACKAGE / module.replace('.', '/')).with_suffix('.py').is_file() or (
            PACKAGE / module.replace('.', '/') / '__init__.py').is_file()


def test_package_imports_neither_configs_nor_tests():
    assert not [(path, name) for _, path in parts() for name, _ in imports_in(path)
                if name.split('.')[0] in ('configs', 'tests', 'launch')]


def test_data_and_pictures_know_no_model_code():
    assert not [(path, name) for part, path in parts() if part in ('data', 'viz') for name, _ in imports_in(path)
                if name.split('.')[0] in ('flax', 'optax', 'orbax', 'ml_collections')]


def test_only_doors_and_the_configs_import_ml_collections():
    users = {path for path in files_of(PACKAGE) + files_of(ROOT / 'configs')
             for name, _ in imports_in(path) if name.split('.')[0] == 'ml_collections'}
    assert PACKAGE / 'main.py' in users
    assert not {path for path in users if path.parent not in (PACKAGE, ROOT / 'configs')}


def test_tensorflow_and_torch_are_imported_nowhere_but_guarded_where_they_are_used():
    heavy = [(path.relative_to(PACKAGE).as_posix(), name, guarded) for path in files_of(PACKAGE)
             for name, guarded in imports_in(path) if name.split('.')[0] in HEAVY and name not in LIGHT]
    assert heavy == [('benchmarks/torch_evit.py', 'torch', True), ('metrics/writers.py', 'clu.metric_writers', True)]
    assert not [(path, name) for path in files_of(ROOT / 'configs') for name, _ in imports_in(path)
                if name.split('.')[0] in HEAVY]


def test_light_modules_of_clu_import_no_tensorflow():
    code = 'import sys; from clu import metrics, parameter_overview; sys.exit("tensorflow" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
