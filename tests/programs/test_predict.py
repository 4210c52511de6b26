"""The predict program: its images, its output and its exit codes."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

import evit_jax
from evit_jax import cli
from evit_jax.inference.images import find_images
from evit_jax.inference.model import VisionModel
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from evit_jax.runtime import storage
from tests.helpers import fake_hub, layouts, program_modules, published, tiny
from tests.helpers.folders import hide_inodes


@pytest.fixture(scope='module', autouse=True)
def unconfigured_logging():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, 'configure_logging', lambda: None)
        yield


def save(model, folder):
    model.save(folder)
    return str(folder)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tiny.model(), tmp_path_factory.mktemp('weights'))


@pytest.fixture
def images(tmp_path):
    """Two images, one of them in a subfolder; hidden images, and a text file."""
    for number, name in enumerate(('a.png', 'below/b.JPG', 'below/.hidden.png', '.cache/c.png')):
        (tmp_path / 'shots' / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'shots' / name)
    (tmp_path / 'shots' / 'notes.txt').write_text('no image')
    return tmp_path / 'shots'


predict = program_modules.module_fixture('predict')


def run(predict, capsys, monkeypatch, *words, stdin=''):
    """Runs the program; returns its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, 'argv', ['predict', *map(str, words)])
    monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
    with flagsaver.flagsaver():
        try:
            code = cli.run(predict.main, 'CHECKPOINT', 'IMAGES...')
        except SystemExit as error:
            code = error.code
    printed = capsys.readouterr()
    return code or 0, printed.out, printed.err


@pytest.fixture
def program(predict, capsys, monkeypatch):
    return lambda *words, **how: run(predict, capsys, monkeypatch, *words, **how)


def test_predict_computes_with_folded_batch_normalisation(predict, tmp_path, images, program, monkeypatch):
    config = evit_jax.LVViTConfig(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=3, stem_width=4)
    made = []
    monkeypatch.setattr(predict, 'VisionModel', lambda loaded, **options: made.append(
        VisionModel(loaded, **options)) or made[-1])
    code, output, _ = program(save(evit_jax.create_model(config), tmp_path / 'weights'), images)
    assert code == 0 and output.count('%') == 6
    model, = made
    assert 'bn1' not in model.compiled(2)._replicated.params['patch_embed']


def test_find_images_folder_names_the_images_below_it_without_hidden_ones(images):
    assert find_images([str(images)]) == [f'{images}/a.png', f'{images}/below/b.JPG']
    (images / 'below' / 'again').symlink_to(images)
    assert len(find_images([str(images)])) == 2


def test_find_images_without_inodes_enters_every_folder_once(images, monkeypatch):
    (images / 'below' / 'again').symlink_to(images)
    hide_inodes(monkeypatch)
    assert find_images([str(images)]) == [f'{images}/a.png', f'{images}/below/b.JPG']


def test_find_images_leaves_out_a_pipe_in_a_folder_and_in_a_pattern(images, caplog):
    os.mkfifo(images / 'pipe.png')
    assert find_images([str(images), f'{images}/*.png']) == [f'{images}/a.png', f'{images}/below/b.JPG',
                                                             f'{images}/a.png']
    assert "pipe.png' is no regular file and is left out" in caplog.text


def test_find_images_keeps_the_order_of_the_words(images):
    a, b = f'{images}/a.png', f'{images}/below/b.JPG'
    assert find_images([b, f'{images}/*', a]) == [b, a, b, a]
    assert find_images([f'{images}/**']) == [a, b]
    assert find_images([f'{images}/**/*.JPG', '-'], ['x y.png\n', '\n', 'z.png']) == [b, 'x y.png', 'z.png']
    assert find_images(['absent.png']) == ['absent.png']  # reading it reports the problem
    (images / 'c[1].png').write_bytes(b'')
    assert find_images([f'{images}/c[1].png']) == [f'{images}/c[1].png']


@pytest.mark.parametrize('word, message', [
    ('nothing', r'no image is in .*nothing \(\.jpg'), ('*.gif', r'no file matches'),
    ('*.txt', r'no image is in'), ('-', 'no file is named on standard input')])
def test_find_images_word_without_images_is_refused(tmp_path, images, word, message):
    (images / 'nothing').mkdir()
    with pytest.raises(ValueError, match=message):
        find_images([word if word == '-' else f'{images}/{word}'])


def test_predict_prints_a_line_of_guesses_for_each_image(program, checkpoint, images):
    code, out, _ = program(checkpoint, images, '--top', 2)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2
    assert lines[0].startswith(f'{images}/a.png: ') and lines[0].count(' %') == 2


def test_predict_json_prints_an_object_for_each_image(program, checkpoint, images):
    (images / 'broken.png').write_bytes(b'torn')
    code, out, err = program(checkpoint, images, '--json', '--tokens=3')
    first, broken, last = map(json.loads, out.splitlines())
    assert code == 1
    assert [len(first['top']), len(first['kept'][0]), first['kept'][0][-1]] == [3, 4, -1]
    assert first['top'][0].keys() == {'label', 'name', 'probability'}
    assert broken['image'].endswith('broken.png') and 'not a readable image' in broken['error']
    assert last['image'].endswith('b.JPG')


def test_predict_flags_set_the_plan(program, checkpoint, images):
    for flags, kept in ((('--rate=0.25',), 4), (('--rates', '0.75'), 12), ((), 8)):
        _, out, _ = program(checkpoint, images / 'a.png', '--json', *flags)
        assert len(json.loads(out)['kept'][0]) == kept + 1


def test_predict_takes_any_reducer(program, checkpoint, images):
    for flags, tokens in ((('--reducer=tome',), [8]), (('--reducer=tome', '--r=3'), [13, 10, 7, 5]),
                          (('--reducer=pool', '--rate=0.25'), [4])):
        code, out, _ = program(checkpoint, images / 'a.png', '--json', *flags)
        result = json.loads(out)
        assert code == 0 and [len(kept) for kept in result['kept']] == tokens[:len(result['kept'])]
        assert [set(index) for index in result['token_of_patch']] == [set(range(len(kept))) for kept in result['kept']]
    for flags in ('--reducer=random', '--reducer=least', '--r=0'):
        code, out, _ = program(checkpoint, images / 'a.png', '--json', flags)
        assert code == 0 and 'token_of_patch' not in json.loads(out)


def test_predict_pictures_are_named_after_the_images_and_replace_none(program, checkpoint, images, caplog):
    (images / 'below' / 'a.png').write_bytes((images / 'a.png').read_bytes())
    (images / 'b.png').write_bytes(b'torn')
    before = (images / 'a.png').read_bytes()
    code, _, _ = program(checkpoint, images, '--kept', images)
    assert code == 1
    assert f'cannot be read: {images}/b.png: not a readable image' in caplog.text
    assert '1 of 4 images could not be read' in caplog.text
    assert sorted(path.name for path in images.glob('*_kept*')) == ['a_kept.png', 'a_kept_2.png', 'b_kept.png']
    assert (images / 'a.png').read_bytes() == before
    assert Image.open(images / 'a_kept.png').width > 2 * 16 * 8


@pytest.mark.parametrize('words, message', [
    (('none', 'a.png'), 'there is no file or folder none: give the folder of a run, a file or folder of weights'),
    (('CHECKPOINT/config.json', 'a.png'), 'config.json is neither a PyTorch checkpoint (.pth, .pt) nor safetensors'),
    (('CHECKPOINT', 'a.png', '--rate=1.5'), 'keep rate 1.5 is outside (0, 1]'),
    (('CHECKPOINT', 'a.png', '--rate=0.5', '--tokens=9'), 'give only one of keep rate and tokens'),
    (('CHECKPOINT', 'a.png', '--rates=0.5;0.7'), '--rates=0.5;0.7 is no list of numbers'),
    (('CHECKPOINT', 'a.png', '--tokens=0.5'), '--tokens=0.5 is no list of whole numbers'),
    (('CHECKPOINT', 'a.png', '--kept=CHECKPOINT/config.json/x'), 'cannot be written (Not a directory)'),
    (('CHECKPOINT', 'a.png', '--ema'), 'holds no moving average'),
    (('CHECKPOINT', 'a.png', '--top=0'), '--top=0'),
    (('CHECKPOINT', 'a.png', '--reducer=tomme'), "unknown reducer 'tomme': did you mean tome?"),
    (('CHECKPOINT', 'a.png', '--reducer=dynamicvit'), 'dynamicvit needs a learned module'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--rate=0.4'), 'r=9 of 16 tokens cannot be merged by tome'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--r=9'), 'r=9 would merge 9 of 16 tokens in the first block'),
    (('CHECKPOINT', 'a.png', '--r=2'), 'evit merges none'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--r=2', '--rate=0.5'), 'give only one of keep rate and r'),
    (('CHECKPOINT', '-'), 'no file is named on standard input'),
    (('CHECKPOINT', '*.gif'), 'no file matches *.gif'),
    (('CHECKPOINT',), 'give CHECKPOINT and IMAGES..., not ')])
def test_predict_with_wrong_arguments_ends_with_code_2_and_one_line(program, checkpoint, words, message):
    code, out, err = program(*(word.replace('CHECKPOINT', checkpoint) for word in words))
    assert code == 2 and out == ''
    assert err.startswith('error: ') and message in err and err.count('\n') == 1


def test_predict_folder_that_is_not_writable_is_refused_before_any_prediction(program, checkpoint, monkeypatch,
                                                                               predict):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(storage, 'write_atomic', refuse)
    monkeypatch.setattr(predict, 'VisionModel', None)
    code, _, err = program(checkpoint, 'a.png', f'--kept={checkpoint}')
    assert code == 2 and 'cannot be written (Permission denied): give another folder' in err


def test_run_with_another_number_of_words_is_refused(capsys, monkeypatch):
    for words, message in ((('a', 'b', 'c'), "unexpected argument 'c'"), (('a',), 'give SRC and DST, not a')):
        monkeypatch.setattr(sys, 'argv', ['convert', *words])
        with flagsaver.flagsaver(), pytest.raises(SystemExit):
            cli.run(None, 'SRC', 'DST')
        assert message in capsys.readouterr().err


def test_predict_reads_names_from_a_pipe_and_ends_quietly_when_its_output_is_closed(tmp_path, images):
    """Starts the program in another process."""
    folder = save(tiny.model(), tmp_path / 'weights')
    done = subprocess.run([sys.executable, '-m', 'evit_jax.predict', folder, '-', '--rate=0.5', '--top=3'],
                          input=f'{images}/a.png\nabsent.png\n', cwd=layouts.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f'{images}/a.png: ') and done.stdout.count('%') == 3
    assert 'cannot be read: absent.png: No such file or directory' in done.stderr
    lines = [line for line in done.stderr.splitlines() if ' progress.py:' not in line]  # logged on a slow machine
    assert 'Traceback' not in done.stderr and len(lines) == 3
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, '-m', 'evit_jax.predict', folder, str(images)], stdout=writing,
                          stderr=subprocess.PIPE, cwd=layouts.ROOT, text=True)
    assert done.returncode == 141 and 'Traceback' not in done.stderr and 'rror' not in done.stderr


def test_predict_uses_a_plan_file_and_refuses_one_for_another_model(program, checkpoint, images, tmp_path):
    planned = PlanFile.of(make_plan(16, 2, tokens=(6,), reduce_at=(0,)), 'custom', 16)
    (tmp_path / 'plan.json').write_text(json.dumps(planned.metadata()))
    _, out, _ = program(checkpoint, images / 'a.png', '--json', f'--plan={tmp_path / "plan.json"}')
    assert len(json.loads(out)['kept'][0]) == 7
    code, _, err = program(checkpoint, images, '--rate=0.5', f'--plan={tmp_path / "plan.json"}')
    assert (code, err) == (2, 'error: give only one of keep rate and plan\n')
    (tmp_path / 'plan.json').write_text(json.dumps(planned._replace(patches=64, image_size=32).metadata()))
    code, _, err = program(checkpoint, images, f'--plan={tmp_path / "plan.json"}')
    assert code == 2 and 'is for custom with 64 patches and 2 blocks, and this is custom with 16' in err


def test_predict_model_of_the_hub_or_a_file(program, images, tmp_path, monkeypatch):
    for name, content in published.files().items():
        (tmp_path / name).write_bytes(content)
    with fake_hub.running() as server:
        fake_hub.connect(monkeypatch, server.endpoint, tmp_path / 'cache')
        server.add('lab/vit', published.files())
        code, output, _ = program('hf-hub:lab/vit', images / 'a.png', '--rate=0.7')
        assert code == 0 and 'a.png: class ' in output
        code, _, errors = program('hf-hub:lab/none', images / 'a.png')
        assert code == 2 and errors.startswith('error: ') and 'lab/none does not exist or is private' in errors
        assert len(errors.splitlines()) == 1
    assert program(tmp_path / 'model.safetensors', images / 'a.png', '--rate=0.7') == (0, output, '')
