"""Exported models equal the original model, run without this package, and appear only when complete."""

import hashlib
import json
import re
import subprocess
import sys
import types

import jax
import jax.export
import numpy as np
import pytest
from PIL import Image

from evit_jax.checkpoints.loaded import load_model
from evit_jax.data.transforms.decode import decode
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.inference.model import VisionModel
from evit_jax.runtime import storage
from evit_jax.serving import artifact, loader
from tests.helpers import exports, layouts

SIDE = 16
checkpoint, export, run = exports.checkpoint, exports.export, exports.run


@pytest.fixture(scope='module')
def plans(checkpoint):
    trained = load_model(checkpoint)
    return {'0.5': trained.plan(keep_rate=0.5), '1.0': trained.plan(keep_rate=1.0), '3': trained.plan(tokens=(3,))}


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory, run):
    folder = tmp_path_factory.mktemp('exported') / 'model'
    code, errors = run(checkpoint, folder, '--rates=0.5,1', '--tokens=3', '--kept')
    assert code == 0, errors
    return folder


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize('batch', [pytest.param(1, marks=pytest.mark.slow), 5])
def test_served_gives_the_probabilities_and_kept_patches_of_the_model(checkpoint, plans, exported, batch):
    served, model = loader.Served(exported), VisionModel(load_model(checkpoint), batch_size=1)
    assert list(served.programs) == list(plans)
    images = noise(batch, seed=batch)
    for name, plan in plans.items():
        got = served(images, name)
        for row, want in enumerate(model.with_plan(plan=plan).predict(images)):
            np.testing.assert_allclose(got['probabilities'][row], jax.nn.softmax(want.logits), rtol=0, atol=1e-5)
            assert len(got.get('kept', ())) == len(want.kept)
            for stage, kept in enumerate(want.kept):
                np.testing.assert_array_equal(got['kept'][stage][row], kept)
                np.testing.assert_allclose(got['class_attention'][stage][row], want.attention[stage], atol=1e-6)
    different = [np.asarray(served(noise(2), name)['probabilities']) for name in plans]
    assert not np.allclose(different[0], different[1], atol=1e-4)
    np.testing.assert_array_equal(served(noise(2))['probabilities'], different[0])  # the default plan


def test_exported_program_is_for_all_platforms_any_batch_and_holds_no_weights(exported):
    for file in exported.glob('*.jaxexport'):
        content = file.read_bytes()
        program = jax.export.deserialize(bytearray(content))
        assert program.platforms == ('cpu', 'cuda', 'tpu') and program.nr_devices == 1
        assert str(program.in_avals[-1]) == 'uint8[b,16,16,3]'
        assert len(content) < (exported / 'weights.npz').stat().st_size / 4
        assert str(layouts.ROOT).encode() not in content and sys.prefix.encode() not in content
    served = loader.Served(exported)
    before = np.asarray(served(noise(1))['probabilities'])
    served.weights['head.bias'] = served.weights['head.bias'] + np.array([9, 0, 0], np.float32)
    assert served(noise(1))['probabilities'][0, 0] > max(0.9, before[0, 0])


def test_loader_of_the_readme_runs_without_this_package(checkpoint, exported, tmp_path):
    text = (exported / 'README.md').read_text(encoding='utf-8')
    code = re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
    assert code == (exported / 'serve.py').read_text(encoding='utf-8')
    for number, size in enumerate(((40, 30), (16, 50))):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)).save(
            tmp_path / f'{number}.png')
    start = ('import runpy, sys\n'
             'for name in "evit_jax flax orbax simplejpeg etils ml_collections".split(): sys.modules[name] = None\n'
             'sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")')
    done = subprocess.run([sys.executable, '-I', '-X', 'utf8', '-c', start, exported / 'serve.py', '0.png', '1.png'],
                          cwd=tmp_path, capture_output=True, text=True, encoding='utf-8')
    assert done.returncode == 0, done.stderr
    model = VisionModel(load_model(checkpoint), batch_size=2).with_plan(keep_rate=0.5)
    predictions = model.predict([tmp_path / '0.png', tmp_path / '1.png'])
    assert done.stdout == ''.join(f'{number}.png: {prediction.top[0].name} {prediction.top[0].probability:.1%}\n'
                                  for number, prediction in enumerate(predictions))


def pictures(folder):
    """Writes images of many formats and modes; returns their paths."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (5, 4, 4), np.uint8), 'RGBA').resize((37, 51))
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    plain = colours.convert('RGB')
    for number, (picture, suffix, options) in enumerate((
            (plain, 'jpg', {}), (plain, 'jpg', {'exif': exif, 'quality': 40}), (plain.convert('CMYK'), 'jpg', {}),
            (plain.convert('L'), 'jpg', {}), (colours, 'png', {}), (colours, 'png', {'exif': exif}),
            (colours.convert('LA'), 'png', {}), (plain.quantize(8), 'png', {'transparency': 1}),
            (plain.convert('1'), 'png', {}), (colours, 'webp', {}), (plain, 'gif', {}), (plain, 'tif', {'exif': exif}),
            (plain, 'bmp', {}), (plain.resize((SIDE, SIDE)), 'png', {}), (plain.resize((3, 111)), 'png', {}),
            (plain.resize((201, 7)), 'png', {}), (plain.resize((1, 1)), 'png', {}))):
        picture.save(folder / f'{number:02d}.{suffix}', **options)
    return sorted(folder.iterdir())


@pytest.mark.parametrize('size', [(SIDE, SIDE), (SIDE, 2 * SIDE)])
@pytest.mark.parametrize('crop', [None, 0.875, 1.0, 0.7])
def test_served_read_gives_the_pixels_of_an_evaluation(tmp_path, crop, size):
    served = object.__new__(loader.Served)
    served.manifest = {'image': {'size': size, 'crop': crop, 'interpolation': 'lanczos'}}
    for path in pictures(tmp_path):
        want = EvalTransform(size, crop=crop, interpolation='lanczos')(decode(path.read_bytes()))
        np.testing.assert_array_equal(served.read(path), want, path.name)


def test_export_another_reducer_is_in_the_manifest(checkpoint, tmp_path, run):
    code, errors = run(checkpoint, tmp_path / 'merging', '--reducer=tome', '--r=2', '--platforms=cpu')
    assert code == 0, errors
    plan, = json.loads((tmp_path / 'merging' / 'manifest.json').read_text())['plans'].values()
    depth = layouts.SHAPE.depth
    assert plan['reducer'] == 'tome' and plan['tokens'] == [16 - 2 * block for block in range(1, depth + 1)]


def test_export_manifest_describes_files_checkpoint_and_plans(checkpoint, plans, exported):
    manifest, trained = json.loads((exported / 'manifest.json').read_text(encoding='utf-8')), load_model(checkpoint)
    assert files_of(exported) == sorted([*manifest['files'], 'manifest.json'])
    for name, file in manifest['files'].items():
        content = (exported / name).read_bytes()
        assert file == {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    assert manifest['class_names'] == list(exports.NAMES)
    assert manifest['outputs'] == ['probabilities', 'features', 'kept', 'token_of_patch', 'class_attention']
    assert manifest['checkpoint'] == {'path': str(checkpoint), 'step': 0, 'weights': 'trained'}
    assert (manifest['image']['size'], manifest['image']['crop'], manifest['kept']) == ([SIDE, SIDE], 1.0, True)
    for name, plan in plans.items():
        entry = manifest['plans'][name]
        assert (entry['macs'], entry['fused']) == (trained.config.macs(plan), True)
        assert entry['tokens'] == ([] if name == '1.0' else [plan.counts[0]])
    assert manifest['plans']['1.0']['macs_of_dense'] == 1 > manifest['plans']['0.5']['macs_of_dense']
    readme = (exported / 'README.md').read_text(encoding='utf-8')
    assert '| `0.5` | 16 > 9 |' in readme
    assert f'(calling convention {manifest["versions"]["calling_convention"]})' in readme


def test_export_without_plans_exports_that_of_training_reproducibly(checkpoint, tmp_path, monkeypatch, caplog, run):
    caplog.set_level('INFO')
    assert run(checkpoint, tmp_path / 'new' / 'one', '--dtype=bfloat16') == (0, '')
    assert re.search(r"plan trained: run on cpu, its outputs differ from the model's by \S+ at most", caplog.text)
    monkeypatch.setattr(artifact, 'check', lambda *_: ())
    assert run(checkpoint, tmp_path / 'new' / 'two', '--dtype=bfloat16') == (0, '')
    one, two = (json.loads((tmp_path / 'new' / name / 'manifest.json').read_text()) for name in ('one', 'two'))
    assert list(one['plans']) == ['trained'] and one['plans']['trained']['tokens'] == [13]
    assert one['model']['dtype'] == 'bfloat16'
    assert one == two
    assert set(loader.Served(tmp_path / 'new' / 'one')(noise(1))) == {'probabilities', 'features'}
    assert files_of(tmp_path / 'new') == ['one', 'two']


def test_export_for_other_platforms_warns_that_programs_were_not_run(checkpoint, tmp_path, caplog, run):
    assert run(checkpoint, tmp_path / 'tpu', '--platforms=tpu,cuda', '--rates=0.5') == (0, '')
    assert 'the programs were not run: they are for tpu, cuda, and this machine computes on cpu' in caplog.text
    with pytest.raises(ValueError, match='tpu'):
        loader.Served(tmp_path / 'tpu')(noise(1))


def test_export_orbax_is_loaded_like_a_run(checkpoint, tmp_path, run):
    assert run(checkpoint, tmp_path / 'orbax', '--format=orbax') == (0, '')
    old, new = load_model(checkpoint), load_model(tmp_path / 'orbax')
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    assert old._replace(path='', params=None) == new._replace(path='', params=None)
    assert files_of(tmp_path) == ['orbax']
    code, errors = run(checkpoint, tmp_path / 'x', '--format=orbax', '--rates=0.5')
    assert code == 2 and '--rates applies to programs, and a checkpoint holds none: leave it out' in errors


@pytest.mark.parametrize('words, message', [
    (('--rates=0.5,1.5',), 'keep rate 1.5 is outside (0, 1]'),
    (('--rates=0.5,half',), '--rates=0.5,half is no list of numbers'),
    (('--rates=nan',), 'keep rate nan is outside (0, 1]'),
    (('--rates=0.5,0.50',), 'the plan 0.5 is given twice'),
    (('--tokens=3,4',), 'tokens=(3, 4) has 2 values for 1 reductions'),
    (('--reducer=tomme',), "unknown reducer 'tomme': did you mean tome?"),
    (('--r=2',), 'evit merges none'),
    (('--tokens=',), '--tokens= is no list of whole numbers'),
    (('--platforms=cpu,gpu',), "--platforms: 'gpu' is unknown, there are cpu, cuda, rocm, tpu"),
    (('--platforms=',), '--platforms is empty'),
    (('--dtype=int8',), 'dtype'),
    (('--ema',), 'holds no moving average')])
def test_export_invalid_flag_is_refused_before_writing(checkpoint, tmp_path, monkeypatch, words, message, run):
    monkeypatch.setattr(artifact, 'write', None)
    code, text = run(checkpoint, tmp_path / 'new', *words)
    assert code == 2 and text.startswith('error: ') and message in text and '\n' not in text
    assert files_of(tmp_path) == []


def test_export_existing_path_is_not_overwritten(checkpoint, tmp_path, monkeypatch, run, export):
    monkeypatch.setattr(export, 'open_model', None)
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'folder').mkdir()
    for name in 'file', 'link', 'folder':
        code, errors = run(checkpoint, tmp_path / name)
        assert code == 2 and 'exists, and is not overwritten: give another DIR' in errors
    assert 'is not a local folder' in run(checkpoint, 'gs://bucket/served')[1]
    assert files_of(tmp_path) == ['file', 'folder', 'link'] and (tmp_path / 'file').read_text() == 'mine'


def test_export_folder_appears_after_the_check_and_not_after_a_failure(checkpoint, tmp_path, monkeypatch, run):
    observed = []

    def look(folder, *_):
        observed.append((folder.parent == tmp_path, (tmp_path / 'new').exists(), len(files_of(folder))))
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, 'check', look)
    assert run(checkpoint, tmp_path / 'new', '--rates=0.5')[0] == 130
    assert observed == [(True, False, 5)] and files_of(tmp_path) == []


def test_export_full_disk_or_unwritable_folder_is_refused(checkpoint, tmp_path, monkeypatch, run):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(artifact, 'export', None)  # fails if a program is exported
    (tmp_path / 'file').write_text('')
    code, errors = run(checkpoint, tmp_path / 'file' / 'new')
    assert code == 2 and 'new cannot be written (Not a directory): free space there, or give another folder' in errors
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=2000))
        for form in 'stablehlo', 'orbax':
            code, errors = run(checkpoint, tmp_path / 'new', f'--format={form}')
            assert code == 2 and 'new cannot be written (0.0 MB free, 0.4 MB to write): free space there' in errors
    monkeypatch.setattr(artifact.np, 'savez', full)
    code, errors = run(checkpoint, tmp_path / 'new')
    assert code == 2 and 'new cannot be written (No space left on device)' in errors and '\n' not in errors
    assert files_of(tmp_path) == ['file']


def test_check_program_with_other_probabilities_is_refused(checkpoint, plans, exported):
    trained = load_model(checkpoint)
    assert max(difference for _, difference in artifact.check(exported, trained, plans)) < 1e-5
    trained.params['head']['bias'] = trained.params['head']['bias'] + np.array([1, 0, 0], np.float32)
    with pytest.raises(ValueError, match=r"plan 0.5 differ from the model's by up to .*rounding explains 1e-04"):
        list(artifact.check(exported, trained, plans))


def test_export_without_the_plan_of_training_warns_of_the_default(checkpoint, tmp_path, caplog, run):
    assert run(checkpoint, tmp_path / 'new', '--rates=0.5,1', '--platforms=cpu')[0] == 0
    assert 'the plan of training is not among those requested: 0.5 is the default' in caplog.text
