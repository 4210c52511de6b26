"""Exported models: they give what the model gives, need nothing of this package, and appear whole or not at all."""

import dataclasses
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
from absl.testing import flagsaver
from PIL import Image

from evit_jax import cli, models
from evit_jax.checkpoints import weights
from evit_jax.data.transforms.decode import decode
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.inference import Predictor, load_model
from evit_jax.serving import artifact, loader
from tests.helpers import doors, layouts

NAMES = 'red', 'grün', 'blue'
SIDE = 16


@pytest.fixture(scope='module', autouse=True)
def least():
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setitem(models.CONFIGS, 'vit_layouts', dataclasses.replace(layouts.SHAPE, classes=3))
        patch.setattr(cli, 'configure_logging', lambda: None)
        yield


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """Weights that nobody trained."""
    folder = tmp_path_factory.mktemp('weights')
    params = models.create(models.get_config('vit_layouts')).init(jax.random.key(1))
    weights.save(folder, params, {
        'config': layouts.config_of(keep__rate=0.75, model__reduce_at=(0,)).to_dict(), 'class_names': NAMES})
    return folder


@pytest.fixture(scope='module')
def plans(checkpoint):
    trained = load_model(checkpoint)
    return {'0.5': trained.plan(rate=0.5), '1.0': trained.plan(rate=1.0), '3': trained.plan(tokens=(3,))}


@pytest.fixture(scope='module')
def exported(checkpoint, tmp_path_factory, run):
    folder = tmp_path_factory.mktemp('exported') / 'model'
    with pytest.MonkeyPatch.context() as patch:
        code, said = run(patch, checkpoint, folder, '--rates=0.5,1', '--tokens=3', '--kept')
    assert code == 0, said
    return folder


export = doors.imported('export')


@pytest.fixture(scope='module')
def run(export):
    """(patch, words of a command line) -> exit code of the program, and what it printed of errors."""

    def start(patch, *words):
        said = []
        patch.setattr(sys, 'argv', ['export', *map(str, words)])
        patch.setattr('builtins.print', lambda text, **_: said.append(text))
        with flagsaver.flagsaver():
            try:
                cli.run(export.main, 'CHECKPOINT', 'DIR')
            except SystemExit as end:
                return end.code, '\n'.join(said)
        return 0, '\n'.join(said)

    return start


def noise(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_artifact_gives_the_models_probabilities_and_kept_patches_under_every_plan(checkpoint, plans, exported):
    served, predictor = loader.Served(exported), Predictor(load_model(checkpoint), batch_size=1)
    assert list(served.programs) == list(plans)
    for batch in (1, 5):
        images = noise(batch, seed=batch)
        for name, plan in plans.items():
            got = served(images, name)
            for row, want in enumerate(predictor.predict(images, plan=plan)):
                np.testing.assert_allclose(got['probabilities'][row], jax.nn.softmax(want.logits), rtol=0, atol=1e-5)
                assert len(got['kept']) == len(want.kept)
                jax.tree.map(np.testing.assert_array_equal, [kept[row] for kept in got['kept']], list(want.kept))
    different = [np.asarray(served(noise(2), name)['probabilities']) for name in plans]
    assert not np.allclose(different[0], different[1], atol=1e-4)
    np.testing.assert_array_equal(served(noise(2))['probabilities'], different[0])  # the first, where none is named


def test_one_program_is_for_all_platforms_and_any_batch_and_holds_no_weights(exported):
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


def test_the_loader_in_the_readme_runs_where_nothing_of_ours_can_be_imported(checkpoint, exported, tmp_path):
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
    trained = load_model(checkpoint)
    found = Predictor(trained, batch_size=2).predict([tmp_path / '0.png', tmp_path / '1.png'], rate=0.5)
    assert done.stdout == ''.join(f'{number}.png: {prediction.top[0].name} {prediction.top[0].probability:.1%}\n'
                                  for number, prediction in enumerate(found))


def pictures(folder):
    """Files of many kinds and forms."""
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 256, (5, 4, 4), np.uint8), 'RGBA').resize((37, 51))
    exif = Image.Exif()
    exif[0x112] = 6  # a quarter turn
    plain = colours.convert('RGB')
    for number, (picture, suffix, how) in enumerate((
            (plain, 'jpg', {}), (plain, 'jpg', {'exif': exif, 'quality': 40}), (plain.convert('CMYK'), 'jpg', {}),
            (plain.convert('L'), 'jpg', {}), (colours, 'png', {}), (colours, 'png', {'exif': exif}),
            (colours.convert('LA'), 'png', {}), (plain.quantize(8), 'png', {'transparency': 1}),
            (plain.convert('1'), 'png', {}), (colours, 'webp', {}), (plain, 'gif', {}), (plain, 'tif', {'exif': exif}),
            (plain, 'bmp', {}), (plain.resize((SIDE, SIDE)), 'png', {}), (plain.resize((3, 111)), 'png', {}),
            (plain.resize((201, 7)), 'png', {}), (plain.resize((1, 1)), 'png', {}))):
        picture.save(folder / f'{number:02d}.{suffix}', **how)
    return sorted(folder.iterdir())


@pytest.mark.parametrize('crop', [None, 0.875, 1.0, 0.7])
def test_the_loader_sees_the_pixels_of_an_evaluation(tmp_path, crop):
    served = object.__new__(loader.Served)
    served.metadata = {'image': {'size': SIDE, 'crop': crop}}
    for path in pictures(tmp_path):
        want = EvalTransform(SIDE, crop=crop)(decode(path.read_bytes()))
        np.testing.assert_array_equal(served.read(path), want, path.name)


def test_another_reducer_can_be_packed(checkpoint, tmp_path, monkeypatch, run):
    code, said = run(monkeypatch, checkpoint, tmp_path / 'merging', '--reducer=tome', '--r=2', '--platforms=cpu')
    assert code == 0, said
    plan, = json.loads((tmp_path / 'merging' / 'manifest.json').read_text())['plans'].values()
    depth = models.get_config('vit_layouts').depth
    assert plan['reducer'] == 'tome' and plan['tokens'] == [16 - 2 * block for block in range(1, depth + 1)]


def test_the_manifest_says_what_there_is(checkpoint, plans, exported):
    told, trained = json.loads((exported / 'manifest.json').read_text(encoding='utf-8')), load_model(checkpoint)
    assert files_of(exported) == sorted([*told['files'], 'manifest.json'])
    for name, file in told['files'].items():
        content = (exported / name).read_bytes()
        assert file == {'bytes': len(content), 'sha256': hashlib.sha256(content).hexdigest()}
    assert told['class_names'] == list(NAMES)
    assert told['checkpoint'] == {'path': str(checkpoint), 'step': 0, 'weights': 'trained'}
    assert (told['image']['size'], told['image']['crop'], told['kept']) == (SIDE, 1.0, True)
    for name, plan in plans.items():
        mine = told['plans'][name]
        assert (mine['macs'], mine['fused']) == (trained.config.macs(plan), True)
        assert mine['tokens'] == ([] if name == '1.0' else [plan.counts[0]])
    assert told['plans']['1.0']['macs_of_dense'] == 1 > told['plans']['0.5']['macs_of_dense']
    readme = (exported / 'README.md').read_text(encoding='utf-8')
    assert '| `0.5` | 16 > 9 |' in readme and f'(calling convention {told["versions"]["calling_convention"]})' in readme


def test_without_plans_there_is_that_of_training_and_the_same_checkpoint_gives_the_same_bytes(checkpoint, tmp_path,
                                                                                              monkeypatch, caplog, run):
    caplog.set_level('INFO')
    assert run(monkeypatch, checkpoint, tmp_path / 'new' / 'one', '--dtype=bfloat16') == (0, '')
    assert re.search(r"plan trained: run on cpu, its probabilities differ from the model's by \S+ at most", caplog.text)
    monkeypatch.setattr(artifact, 'check', lambda *_: ())
    assert run(monkeypatch, checkpoint, tmp_path / 'new' / 'two', '--dtype=bfloat16') == (0, '')
    one, two = (json.loads((tmp_path / 'new' / name / 'manifest.json').read_text()) for name in ('one', 'two'))
    assert list(one['plans']) == ['trained'] and one['plans']['trained']['tokens'] == [13]
    assert one['model']['dtype'] == 'bfloat16'
    assert one == two
    assert set(loader.Served(tmp_path / 'new' / 'one')(noise(1))) == {'probabilities'}
    assert files_of(tmp_path / 'new') == ['one', 'two']


def test_programs_for_other_machines_are_written_and_said_not_to_have_been_run(checkpoint, tmp_path, monkeypatch,
                                                                               caplog, run):
    assert run(monkeypatch, checkpoint, tmp_path / 'tpu', '--platforms=tpu,cuda', '--rates=0.5') == (0, '')
    assert 'not run: the programs are for tpu, cuda, and this machine computes on cpu' in caplog.text
    with pytest.raises(ValueError, match='tpu'):
        loader.Served(tmp_path / 'tpu')(noise(1))


def test_weights_alone_in_orbax_are_a_run_to_all_that_reads_one(checkpoint, tmp_path, monkeypatch, run):
    assert run(monkeypatch, checkpoint, tmp_path / 'orbax', '--format=orbax') == (0, '')
    old, new = load_model(checkpoint), load_model(tmp_path / 'orbax')
    jax.tree.map(np.testing.assert_array_equal, old.params, new.params)
    assert old._replace(path='', params=None) == new._replace(path='', params=None)
    assert files_of(tmp_path) == ['orbax']
    code, said = run(monkeypatch, checkpoint, tmp_path / 'x', '--format=orbax', '--rates=0.5')
    assert code == 2 and '--rates is for programs, and a checkpoint holds none: leave it out' in said


@pytest.mark.parametrize('words, said', [
    (('--rates=0.5,1.5',), 'keep rate 1.5 is outside (0, 1]'),
    (('--rates=0.5,half',), '--rates=0.5,half is no list of numbers'),
    (('--rates=nan',), 'keep rate nan is outside (0, 1]'),
    (('--rates=0.5,0.50',), 'the plan 0.5 is asked for twice'),
    (('--tokens=3,4',), 'tokens=(3, 4) has 2 values for 1 reductions'),
    (('--reducer=tomme',), "unknown reducer 'tomme': did you mean tome?"),
    (('--r=2',), 'evit merges none'),
    (('--tokens=',), '--tokens= is no list of whole numbers'),
    (('--platforms=cpu,gpu',), "--platforms: 'gpu' is unknown, there are cpu, cuda, rocm, tpu"),
    (('--platforms=',), '--platforms is empty'),
    (('--dtype=int8',), 'dtype'),
    (('--ema',), 'holds no moving average')])
def test_what_cannot_be_is_refused_in_one_line_before_anything_is_written(checkpoint, tmp_path, monkeypatch, words,
                                                                          said, run):
    monkeypatch.setattr(artifact, 'write', None)
    code, text = run(monkeypatch, checkpoint, tmp_path / 'new', *words)
    assert code == 2 and text.startswith('error: ') and said in text and '\n' not in text
    assert files_of(tmp_path) == []


def test_what_is_there_is_not_touched(checkpoint, tmp_path, monkeypatch, run, export):
    monkeypatch.setattr(export, 'read_trained', None)
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to(tmp_path / 'nowhere')
    (tmp_path / 'folder').mkdir()
    for name in 'file', 'link', 'folder':
        code, said = run(monkeypatch, checkpoint, tmp_path / name)
        assert code == 2 and 'is there already, and is left as it is: give another DIR' in said
    assert 'no folder of this machine' in run(monkeypatch, checkpoint, 'gs://bucket/served')[1]
    assert files_of(tmp_path) == ['file', 'folder', 'link'] and (tmp_path / 'file').read_text() == 'mine'


def test_it_appears_when_it_is_checked_and_nothing_stays_of_a_failure(checkpoint, tmp_path, monkeypatch, run):
    seen = []

    def look(folder, *_):
        seen.append((folder.parent == tmp_path, (tmp_path / 'new').exists(), len(files_of(folder))))
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, 'check', look)
    assert run(monkeypatch, checkpoint, tmp_path / 'new', '--rates=0.5')[0] == 130
    assert seen == [(True, False, 5)] and files_of(tmp_path) == []


def test_a_full_disk_and_a_folder_that_cannot_be_made_are_told_in_one_line(checkpoint, tmp_path, monkeypatch, run,
                                                                           export):
    def full(*_, **__):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(artifact, 'export', None)  # nothing is computed before
    (tmp_path / 'file').write_text('')
    code, said = run(monkeypatch, checkpoint, tmp_path / 'file' / 'new')
    assert code == 2 and 'new cannot be written (Not a directory): make room there, or give another DIR' in said
    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=2000))
        for how in 'stablehlo', 'orbax':
            code, said = run(monkeypatch, checkpoint, tmp_path / 'new', f'--format={how}')
            assert code == 2 and 'new cannot be written (0.0 MB free, 0.4 MB of weights): make room there' in said
    monkeypatch.setattr(artifact.np, 'savez', full)
    code, said = run(monkeypatch, checkpoint, tmp_path / 'new')
    assert code == 2 and 'new cannot be written (No space left on device)' in said and '\n' not in said
    assert files_of(tmp_path) == ['file']


def test_a_program_that_gives_something_else_is_refused(checkpoint, plans, exported, monkeypatch):
    trained = load_model(checkpoint)
    assert max(difference for _, difference in artifact.check(exported, trained, plans)) < 1e-5
    trained.params['head']['bias'] = trained.params['head']['bias'] + np.array([1, 0, 0], np.float32)
    with pytest.raises(ValueError, match=r"plan 0.5 differ from the model's by up to .*rounding explains 1e-04"):
        list(artifact.check(exported, trained, plans))


def test_an_export_without_the_plan_of_training_warns_which_is_the_default(checkpoint, tmp_path, monkeypatch, caplog,
                                                                          run):
    assert run(monkeypatch, checkpoint, tmp_path / 'new', '--rates=0.5,1', '--platforms=cpu')[0] == 0
    assert 'the plan of training is not among those requested: 0.5 is the default' in caplog.text
