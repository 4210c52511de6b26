"""serve.py of an exported model: its default plan, unreadable images, damaged files and other versions of jax."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from evit_jax.checkpoints.loaded import load_model
from evit_jax.serving import artifact, loader
from evit_jax.serving.manifest import default_plan
from tests.helpers import exports


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Random weights for a keep rate of 0.7 at the second block."""
    return exports.save_random_weights(tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory):
    folder, trained = tmp_path_factory.mktemp('exported'), load_model(checkpoint)
    artifact.write(folder, trained, {name: trained.plan(keep_rate=float(name)) for name in ('0.5', '1.0')},
                   platforms=('cpu',), kept=False)
    return folder


def noise(count):
    return np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)


def serve(folder, *words):
    result = subprocess.run([sys.executable, '-I', '-X', 'utf8', folder / 'serve.py', *words], capture_output=True,
                          text=True, encoding='utf-8')
    return result.returncode, result.stdout.splitlines(), result.stderr.splitlines()


def test_default_plan_is_that_of_training_else_the_first(checkpoint, exported, tmp_path):
    trained = load_model(checkpoint)
    plans = {'0.5': trained.plan(keep_rate=0.5), '0.7': trained.plan(keep_rate=0.7)}
    assert default_plan(trained, plans) == '0.7'
    assert 'it was requested first, and the plan of training was not exported' in (exported / 'README.md').read_text()
    assert default_plan(trained, {'1.0': trained.plan(keep_rate=1.0), '0.5': plans['0.5']}) == '1.0'
    artifact.write(tmp_path, trained, plans, platforms=('cpu',), kept=False)
    served, manifest = loader.Served(tmp_path), json.loads((tmp_path / 'manifest.json').read_text())
    assert manifest['default'] == '0.7' and [plan['trained'] for plan in manifest['plans'].values()] == [False, True]
    np.testing.assert_array_equal(served(noise(2))['probabilities'], served(noise(2), '0.7')['probabilities'])
    assert '`0.7` is the default: it is the plan of training' in (tmp_path / 'README.md').read_text()
    with pytest.raises(ValueError, match=r"there is no plan '0.6', there are 0.5, 0.7"):
        served(noise(1), '0.6')


def test_serve_continues_after_an_unreadable_image(exported, tmp_path):
    for name in ('a.png', 'b\n.png'):
        Image.fromarray(noise(1)[0]).save(tmp_path / name)
    (tmp_path / 'torn.png').write_bytes((tmp_path / 'a.png').read_bytes()[:200])
    code, out, err = serve(exported, *(tmp_path / name for name in ('torn.png', 'a.png', 'absent.png', 'b\n.png')))
    assert code == 1 and len(out) == 2
    assert out[0].startswith(f'{tmp_path}/a.png: ') and out[1].startswith(f'{tmp_path}/b\\n.png: ')
    assert err[0] == 'plan 0.5 is not the plan of training' and len(err) == 3
    assert err[1].startswith(f'cannot be read: {tmp_path}/torn.png: ') and 'absent.png' in err[2]


def test_serve_without_images_or_with_an_unknown_plan_ends_with_code_2(exported):
    code, out, err = serve(exported)
    assert code == 2 and not out and err[0].startswith('usage: serve.py') and 'IMAGE' in err[0]
    code, out, err = serve(exported, '--plan=0.6', 'a.png')
    assert code == 2 and err == ["error: there is no plan '0.6', there are 0.5, 1.0"]


def test_serve_program_of_another_jax_is_refused_with_both_versions(exported, tmp_path):
    shutil.copytree(exported, tmp_path / 'copy')
    manifest = json.loads((exported / 'manifest.json').read_text(encoding='utf-8'))
    manifest['versions']['jax'] = '99.1'
    (tmp_path / 'copy/manifest.json').write_text(json.dumps(manifest))
    for plan in manifest['plans'].values():
        (tmp_path / 'copy' / plan['file']).write_bytes(b'written by a later version')
    code, out, err = serve(tmp_path / 'copy', 'a.png')
    assert (code, out, len(err)) == (2, [], 1)
    assert f'It was written by jax 99.1, this is jax {jax.__version__}: pip install jax==99.1' in err[0]


@pytest.mark.parametrize('file, content, message', [
    ('weights.npz', None, 'BadZipFile'), ('weights.npz', b'', 'EOFError'), ('manifest.json', b'[', 'JSONDecodeError'),
    ('manifest.json', b'{}', "KeyError: 'versions'"), ('manifest.json', b'null', 'TypeError')])
def test_serve_with_a_damaged_file_names_it_in_one_line(exported, tmp_path, file, content, message):
    shutil.copytree(exported, tmp_path / 'copy')
    damaged = tmp_path / 'copy' / file
    damaged.write_bytes(damaged.read_bytes()[:5000] if content is None else content)
    with pytest.raises(RuntimeError, match=f'{file} is damaged .*{message}.*: export the model again'):
        loader.Served(tmp_path / 'copy')


def test_served_damaged_program_of_this_jax_asks_for_a_new_export(exported, tmp_path):
    shutil.copytree(exported, tmp_path / 'copy')
    (tmp_path / 'copy/plan_0.5.jaxexport').write_bytes(b'cut')
    with pytest.raises(RuntimeError, match=r'plan_0.5\.jaxexport cannot be read .*this version of jax.*export the'):
        loader.Served(tmp_path / 'copy')


def test_serve_without_the_requested_backend_names_jax_platforms_in_one_line(exported, monkeypatch):
    monkeypatch.setenv('JAX_PLATFORMS', 'absent')
    code, out, err = serve(exported, 'a.png')
    assert (code, out, len(err)) == (2, [], 1)
    assert err[0].startswith('error: jax has no backend for JAX_PLATFORMS=absent (') and 'JAX_PLATFORMS=cpu' in err[0]

    def fail():
        raise AssertionError  # jax raises this for cuda without its plugin

    monkeypatch.setattr(jax, 'devices', fail)
    with pytest.raises(RuntimeError, match='its plugin is not installed'):
        loader.check_packages()


@pytest.mark.parametrize('version, refused', [('10.4.0', True), ('9.5.0', True), ('11.2.1', False), ('13.0.0', False)])
def test_served_old_pillow_is_refused(exported, monkeypatch, version, refused):
    monkeypatch.setattr(loader.PIL, '__version__', version)
    if not refused:
        return loader.check_packages()
    with pytest.raises(RuntimeError, match=f'Pillow {version} is too old: pip install "Pillow>=11.2"'):
        loader.Served(exported)
    assert "flatbuffers 'Pillow>=11.2'" in (exported / 'README.md').read_text()


def test_write_names_that_are_not_utf8_are_escaped(checkpoint, tmp_path):
    trained = load_model(checkpoint)._replace(class_names=('red\udcff', 'a\nb', 'blue'), path='runs/\udcfe')
    artifact.write(tmp_path, trained, {'trained': trained.plan()}, platforms=('cpu',), kept=False)
    manifest = json.loads((tmp_path / 'manifest.json').read_bytes().decode())
    assert manifest['class_names'] == [r'red\xff', 'a\nb', 'blue'] and manifest['checkpoint']['path'] == r'runs/\xfe'
    with pytest.raises(ValueError, match="platforms='cpu': give a sequence of cpu"):
        artifact.write(tmp_path, trained, {}, platforms='cpu', kept=False)
