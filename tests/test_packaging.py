"""The wheel: its files, and its programs in an environment without the checkout."""

import importlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import version

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
DATA = {'py.typed', 'data/imagenet_classes.txt', 'data/sources/digits.npz', 'serving/samples/cat.jpg',
        'serving/samples/coffee.jpg', 'serving/samples/rocket.jpg', 'viz/analysis_page.css', 'viz/analysis_page.html',
        'viz/live.css', 'viz/live.html', 'viz/live.js', 'viz/page.css', 'viz/page.html', 'viz/panel.css',
        'viz/patches.js', 'viz/report.css', 'viz/report.html', 'viz/report.js', 'viz/search_page.css',
        'viz/search_page.html'}


def test_package_data_lists_every_file_that_is_not_python():
    package = ROOT / 'evit_jax'
    listed = {file.relative_to(package).as_posix() for pattern in PROJECT['tool']['setuptools']['package-data'][
        'evit_jax'] for file in package.glob(pattern)}
    present = {file.relative_to(package).as_posix() for file in package.rglob('*')
               if file.is_file() and file.suffix not in ('.py', '.pyc')}
    assert listed == present == DATA


def test_every_folder_of_the_package_has_an_init_file():
    assert not [file for file in (ROOT / 'evit_jax').rglob('*.py') if not (file.parent / '__init__.py').is_file()]


def test_console_script_names_a_function():
    module, _, function = PROJECT['project']['scripts']['evit'].partition(':')
    assert callable(getattr(importlib.import_module(module), function))


def test_changelog_first_version_is_that_of_the_project():
    headings = [line for line in (ROOT / 'CHANGELOG.md').read_text().splitlines() if line.startswith('## ')]
    assert headings[0].startswith(f'## {PROJECT["project"]["version"]}')


def built_wheel(folder):
    """Builds the wheel from a copy of the checkout, to keep build files out of the checkout. Returns its path."""
    source = folder / 'source'
    for part in ('evit_jax', 'configs'):
        shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns('__pycache__'))
    (source / 'tests').mkdir()
    (source / 'tests' / '__init__.py').touch()
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    # An older setuptools cannot read pyproject.toml; pip then downloads one to build with.
    recent = int(version('setuptools').partition('.')[0]) >= 77
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--quiet', '--no-deps', f'--wheel-dir={folder}', str(source),
                    *(['--no-build-isolation'] if recent else [])], check=True)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    return built_wheel(tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """Returns a function that runs a command of an environment with the wheel, in an empty folder."""
    folder = tmp_path_factory.mktemp('installed')
    venv.create(folder / 'env', with_pip=False)
    python = folder / 'env' / 'bin' / 'python'
    scheme = {'base': str(folder / 'env'), 'platbase': str(folder / 'env')}
    packages = pathlib.Path(sysconfig.get_path('purelib', 'venv', scheme))
    # The dependencies are those of this environment, so that nothing is downloaded.
    (packages / 'dependencies.pth').write_text(f'{sysconfig.get_path("purelib")}\n')
    subprocess.run([sys.executable, '-m', 'pip', '--python', str(python), 'install', '--quiet', '--no-deps',
                    '--no-index', str(wheel)], check=True)
    (work := folder / 'work').mkdir()
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}

    def run(program, *words):
        result = subprocess.run([python.parent / program, *map(str, words)], cwd=work, capture_output=True, text=True,
                                env=environment | {'JAX_PLATFORMS': 'cpu'})
        assert result.returncode == 0, result.stderr[-3000:]
        return result.stdout

    run.folder = work
    return run


@pytest.mark.slow
def test_wheel_holds_package_recipes_and_data_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {file.relative_to(ROOT).as_posix() for file in (ROOT / 'evit_jax').rglob('*.py')}
    recipes = {f'evit_jax/configs/{file.name}' for file in (ROOT / 'configs').glob('*.py')}
    assert {name for name in names if '.dist-info/' not in name} == modules | recipes | {
        f'evit_jax/{name}' for name in DATA}


@pytest.mark.slow
def test_installed_wheel_imports_recipes_from_its_own_folder(installed):
    paths = installed('python', '-c', 'import evit_jax.configs.digits as digits, evit_jax\n'
                      'print(digits.get_config().model.name, evit_jax.__file__, digits.__file__)').split()
    assert paths[0] == 'vit_digits' and all(str(installed.folder.parent) in path for path in paths[1:])


@pytest.mark.slow
def test_installed_wheel_trains_evaluates_predicts_and_exports(installed):
    folder = installed.folder
    tiny = ('--config.data.source=generated', '--config.data.train_split=train[:64]', '--config.epochs=1',
            '--config.data.test_split=test[:32]', '--config.batch_size=16', '--config.model.image_size=32',
            '--config.log.every=1', '--config.keep.shrink_epochs=0', '--config.keep.start_epoch=0',
            '--config.compilation_cache=')
    assert 'train ' in installed('evit', '--help')
    installed('evit', 'train', '--config', 'digits', '--workdir', 'runs/a', *tiny)
    assert (folder / 'runs' / 'a' / 'metrics.jsonl').is_file()
    (folder / 'mine.py').write_text('from evit_jax.configs import digits\n\n\ndef get_config():\n'
                                    '    config = digits.get_config()\n    config.seed = 1\n    return config\n')
    installed('evit', 'evaluate', '--config', 'mine.py', '--workdir', 'runs/a', *tiny, '--config.keep.rate=0.5')
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(image).save(folder / 'image.png')
    line, = installed('evit', 'predict', 'runs/a', 'image.png', '--json').splitlines()
    assert len(json.loads(line)['top']) > 1
    installed('evit', 'export', 'runs/a', 'served', '--rates=0.5')
    assert (folder / 'served' / 'manifest.json').is_file()
