"""Import rules: the packages that each package may import, and imports that must be lazy or guarded."""

import ast
import pathlib
import subprocess
import sys

import pytest

import evit_jax

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'evit_jax'
MAY_IMPORT = {  # packages that each package may import, besides itself
    'configs': set(), 'runtime': set(), 'kernels': set(), 'reduction': {'runtime', 'kernels'},
    'models': {'runtime', 'kernels', 'reduction'},
    'viz': set(), 'data': {'runtime'}, 'metrics': {'runtime'},
    'checkpoints': {'configs', 'runtime', 'reduction', 'models', 'data', 'metrics'}}
MAY_IMPORT['interchange'] = {'runtime', 'kernels', 'reduction', 'models', 'data', 'checkpoints'}
MAY_IMPORT['training'] = {*MAY_IMPORT}
for _above in ('inference', 'serving', 'comparison', 'benchmarks', 'planning'):
    MAY_IMPORT[_above] = set(MAY_IMPORT)
MAY_IMPORT['comparison'] |= {'inference'}  # its cells without training classify features by k-NN
MAY_IMPORT |= {'config_errors': {'configs', 'runtime'}, 'cli': {'config_errors'}}
HEAVY = {'tensorflow', 'torch', 'torchvision', 'timm', 'keras', 'clu'}  # clu.metric_writers imports TensorFlow
LIGHT = {'clu.metrics.Average', 'clu.parameter_overview'}  # modules of clu that do not import TensorFlow


def imports_of(source, module=''):
    """Lists the imports of a file, also inside functions.

    Returns:
      Pairs (dotted name, True if the import is in a `try` statement of a function).
    """
    imports = []

    def visit(node, in_function, guarded):
        in_function |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if isinstance(node, ast.Import):
            imports.extend((alias.name, guarded) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split('.')[:-node.level] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            imports.extend((f'{base}.{alias.name}', guarded) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split('.')[-1] in ('import_module', '__import__'):
            imports.append((node.args[0].value if isinstance(node.args[0], ast.Constant) else '?', guarded))
        for child in ast.iter_child_nodes(node):
            visit(child, in_function, guarded or (in_function and isinstance(node, ast.Try)))

    visit(ast.parse(source), False, False)
    return imports


def files_of(folder):
    return sorted(folder.rglob('*.py'))


def name_of(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def imports_in(path):
    return imports_of(path.read_text(), name_of(path))


def package_of(name):
    """Returns the package or the program of evit_jax that a dotted name belongs to."""
    return (name.split('.') + [''])[1]


def files_by_package():
    """Returns pairs (package or program, file) of all files but the top-level __init__."""
    return [(package_of(name_of(path)), path) for path in files_of(PACKAGE) if path != PACKAGE / '__init__.py']


@pytest.mark.parametrize('source, names', [
    ('import torch', ['torch']), ('import a.b as c, d', ['a.b', 'd']), ('from a import b, c', ['a.b', 'a.c']),
    ('def f():\n  from a.b import c', ['a.b.c']), ('from . import b', ['evit_jax.data.b']),
    ('from ..models import b', ['evit_jax.models.b']), ('importlib.import_module("torch.nn")', ['torch.nn'])])
def test_imports_of_finds_imports_of_every_form(source, names):
    assert [name for name, _ in imports_of(source, 'evit_jax.data.x')] == names


def test_imports_of_marks_imports_in_a_try_of_a_function():
    guard = 'try:\n    import a\n  except ImportError: pass'
    assert imports_of(f'def f():\n  {guard}') == [('a', True)]
    assert imports_of('def f():\n  import a') == [('a', False)]
    assert imports_of('try:\n  import a\nexcept ImportError: pass') == [('a', False)]


def test_import_rules_cover_every_package():
    folders = {package for package, path in files_by_package() if path.parent != PACKAGE}
    assert folders | {'config_errors', 'cli', 'configs'} == set(MAY_IMPORT)


def test_package_imports_only_allowed_packages_and_no_program():
    wrong = []
    for package, path in files_by_package():
        allowed = {package} | MAY_IMPORT.get(package, {*MAY_IMPORT, 'api'})  # programs may use the public API
        for name, _ in imports_in(path):
            if name.split('.')[0] == 'evit_jax' and package_of(name) not in allowed:
                wrong.append(f'{path.relative_to(ROOT)} imports {name}')
    assert not wrong
    programs = {package for package, _ in files_by_package()} - set(MAY_IMPORT)
    assert {'main', 'benchmark', 'convert', 'describe'} <= programs


def test_top_level_package_imports_its_names_lazily():
    assert [name for name, _ in imports_in(PACKAGE / '__init__.py')] == ['importlib', 'typing.Any', '?']
    for module in set(evit_jax._MODULES.values()):
        assert (PACKAGE / module.replace('.', '/')).with_suffix('.py').is_file() or (
            PACKAGE / module.replace('.', '/') / '__init__.py').is_file()


def test_package_imports_neither_recipes_nor_tests():
    assert not [(path, name) for _, path in files_by_package() for name, _ in imports_in(path)
                if name.split('.')[0] in ('configs', 'tests', 'launch')]


def test_data_and_viz_import_no_model_libraries():
    assert not [(path, name) for package, path in files_by_package() if package in ('data', 'viz')
                for name, _ in imports_in(path)
                if name.split('.')[0] in ('flax', 'optax', 'orbax', 'ml_collections')]


def test_ml_collections_is_imported_by_programs_and_recipes_only():
    users = {path for path in files_of(PACKAGE) + files_of(ROOT / 'configs')
             for name, _ in imports_in(path) if name.split('.')[0] == 'ml_collections'}
    assert PACKAGE / 'main.py' in users
    assert not {path for path in users if path.parent not in (PACKAGE, ROOT / 'configs')}


def test_tensorflow_and_torch_are_imported_only_in_guarded_imports():
    heavy = [(path.relative_to(PACKAGE).as_posix(), name, guarded) for path in files_of(PACKAGE)
             for name, guarded in imports_in(path) if name.split('.')[0] in HEAVY and name not in LIGHT]
    assert heavy == [('benchmarks/torch_evit.py', 'torch', True), ('metrics/writers.py', 'clu.metric_writers', True)]
    assert not [(path, name) for path in files_of(ROOT / 'configs') for name, _ in imports_in(path)
                if name.split('.')[0] in HEAVY]


def test_clu_metrics_and_parameter_overview_import_no_tensorflow():
    code = 'import sys; from clu import metrics, parameter_overview; sys.exit("tensorflow" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
