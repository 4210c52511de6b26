"""The program that predicts: what it takes for images, what it prints and writes, and how it ends."""

import io
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from PIL import Image

from evit_jax import cli, models
from evit_jax.checkpoints import weights
from evit_jax.inference import Predictor
from evit_jax.inference.images import find_images
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.reduction.plan_file import PlanFile
from tests.helpers import doors, layouts
from tests.helpers.folders import hide_inodes


@pytest.fixture(scope='module', autouse=True)
def least():
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setattr(cli, 'configure_logging', lambda: None)
        yield


def save(folder, name, **config):
    model_config = models.get_config(name)
    weights.save(folder, models.create(model_config).init(jax.random.key(0)), {
        'config': {'model': {'name': name, 'reduce_at': (1,), 'image_size': model_config.image_size}, **config},
        'class_names': list(map(str, range(model_config.classes)))})
    return str(folder)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('weights'), 'vit_layouts', keep={'rate': 0.5})


@pytest.fixture
def images(tmp_path):
    """Two images, one of them in a folder below, and what is none."""
    for number, name in enumerate(('a.png', 'below/b.JPG', 'below/.hidden.png', '.cache/c.png')):
        (tmp_path / 'shots' / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / 'shots' / name)
    (tmp_path / 'shots' / 'notes.txt').write_text('no image')
    return tmp_path / 'shots'


predict = doors.imported('predict')


def run(predict, capsys, monkeypatch, *words, stdin=''):
    """Exit code, output and what was said of errors."""
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


def test_what_predicts_has_its_batch_normalisation_folded(predict, tmp_path, images, program, monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'lvvit_least', LVViTConfig(image_size=16, patch_size=4, width=16, depth=2,
                                                                 heads=2, classes=3, stem_width=4))
    made = []
    monkeypatch.setattr(predict, 'Predictor', lambda trained, **how: made.append(trained) or Predictor(trained, **how))
    code, said, _ = program(save(tmp_path / 'weights', 'lvvit_least'), images)
    assert code == 0 and said.count('%') == 6
    assert [trained.config.folded for trained in made] == [True]


def test_a_folder_means_the_images_below_it_without_hidden_ones(images):
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


def test_files_patterns_and_standard_input_keep_the_order_of_the_words(images):
    a, b = f'{images}/a.png', f'{images}/below/b.JPG'
    assert find_images([b, f'{images}/*', a]) == [b, a, b, a]
    assert find_images([f'{images}/**']) == [a, b]
    assert find_images([f'{images}/**/*.JPG', '-'], ['x y.png\n', '\n', 'z.png']) == [b, 'x y.png', 'z.png']
    assert find_images(['absent.png']) == ['absent.png']  # for whoever reads it to report
    (images / 'c[1].png').write_bytes(b'')
    assert find_images([f'{images}/c[1].png']) == [f'{images}/c[1].png']


@pytest.mark.parametrize('word, said', [('nothing', r'no image is in .*nothing \(\.jpg'), ('*.gif', r'no file matches'),
                                        ('*.txt', r'no image is in'), ('-', 'no file is named on standard input')])
def test_where_nothing_is_found_that_is_said(tmp_path, images, word, said):
    (images / 'nothing').mkdir()
    with pytest.raises(ValueError, match=said):
        find_images([word if word == '-' else f'{images}/{word}'])


def test_each_image_is_a_line_of_guesses(program, checkpoint, images):
    code, out, _ = program(checkpoint, images, '--top', 2)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 2
    assert lines[0].startswith(f'{images}/a.png: ') and lines[0].count(' %') == 2


def test_json_has_one_object_a_line_with_the_patches_that_stay(program, checkpoint, images):
    (images / 'broken.png').write_bytes(b'torn')
    code, out, err = program(checkpoint, images, '--json', '--tokens=3')
    first, broken, last = map(json.loads, out.splitlines())
    assert code == 1
    assert [len(first['top']), len(first['kept'][0]), first['kept'][0][-1]] == [5, 4, -1]
    assert first['top'][0].keys() == {'label', 'name', 'probability'}
    assert broken['image'].endswith('broken.png') and 'not a readable image' in broken['error']
    assert last['image'].endswith('b.JPG')


def test_flags_reach_the_plan(program, checkpoint, images):
    for flags, kept in ((('--rate=0.25',), 4), (('--rates', '0.75'), 12), ((), 8)):
        _, out, _ = program(checkpoint, images / 'a.png', '--json', *flags)
        assert len(json.loads(out)['kept'][0]) == kept + 1


def test_any_reducer_can_be_asked_of_a_checkpoint(program, checkpoint, images):
    for flags, tokens in ((('--reducer=tome',), [8]), (('--reducer=tome', '--r=3'), [13, 10, 7, 5]),
                          (('--reducer=pool', '--rate=0.25'), [4])):
        code, out, _ = program(checkpoint, images / 'a.png', '--json', *flags)
        told = json.loads(out)
        assert code == 0 and [len(kept) for kept in told['kept']] == tokens[:len(told['kept'])]
        assert [set(index) for index in told['token_of_patch']] == [set(range(len(kept))) for kept in told['kept']]
    for flags in ('--reducer=random', '--reducer=least', '--r=0'):
        code, out, _ = program(checkpoint, images / 'a.png', '--json', flags)
        assert code == 0 and 'token_of_patch' not in json.loads(out)


def test_pictures_are_named_after_the_images_and_replace_none(program, checkpoint, images, caplog):
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


@pytest.mark.parametrize('words, said', [
    (('none', 'a.png'), 'there is no folder none: give the folder of a run'),
    (('CHECKPOINT/config.json', 'a.png'), 'is a file: give the folder of a run'),
    (('CHECKPOINT', 'a.png', '--rate=1.5'), 'keep rate 1.5 is outside (0, 1]'),
    (('CHECKPOINT', 'a.png', '--rate=0.5', '--tokens=9'), 'give only one of rate and tokens'),
    (('CHECKPOINT', 'a.png', '--rates=0.5;0.7'), '--rates=0.5;0.7 is no list of numbers'),
    (('CHECKPOINT', 'a.png', '--tokens=0.5'), '--tokens=0.5 is no list of whole numbers'),
    (('CHECKPOINT', 'a.png', '--kept=CHECKPOINT/config.json/x'), 'cannot be written (Not a directory)'),
    (('CHECKPOINT', 'a.png', '--ema'), 'holds no moving average'),
    (('CHECKPOINT', 'a.png', '--top=0'), '--top=0'),
    (('CHECKPOINT', 'a.png', '--reducer=tomme'), "unknown reducer 'tomme': did you mean tome?"),
    (('CHECKPOINT', 'a.png', '--reducer=dynamicvit'), 'this model has no predictors'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--rate=0.4'), 'r=9 of 16 tokens cannot be merged by tome'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--r=9'), 'r=9 would merge 9 of 16 tokens in the first block'),
    (('CHECKPOINT', 'a.png', '--r=2'), 'evit merges none'),
    (('CHECKPOINT', 'a.png', '--reducer=tome', '--r=2', '--rate=0.5'), 'give only one of rate and r'),
    (('CHECKPOINT', '-'), 'no file is named on standard input'),
    (('CHECKPOINT', '*.gif'), 'no file matches *.gif'),
    (('CHECKPOINT',), 'give CHECKPOINT and IMAGES..., not ')])
def test_a_wrong_command_ends_with_code_2_and_one_line(program, checkpoint, words, said):
    code, out, err = program(*(word.replace('CHECKPOINT', checkpoint) for word in words))
    assert code == 2 and out == ''
    assert err.startswith('error: ') and said in err and err.count('\n') == 1


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_computed(program, checkpoint, monkeypatch,
                                                                                 predict):
    def refuse(*_, **__):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(predict.tempfile, 'TemporaryFile', refuse)
    monkeypatch.setattr(predict, 'Predictor', None)
    code, _, err = program(checkpoint, 'a.png', f'--kept={checkpoint}')
    assert code == 2 and 'cannot be written (Permission denied): give another folder' in err


def test_a_fixed_number_of_words_is_still_held(capsys, monkeypatch):
    for words, said in ((('a', 'b', 'c'), "unexpected argument 'c'"), (('a',), 'give SRC and DST, not a')):
        monkeypatch.setattr(sys, 'argv', ['convert', *words])
        with flagsaver.flagsaver(), pytest.raises(SystemExit):
            cli.run(None, 'SRC', 'DST')
        assert said in capsys.readouterr().err


def test_the_program_reads_names_from_a_pipe_and_goes_quietly_when_nobody_reads(tmp_path, images):
    """As a user starts it, on a model that is not made up for the tests."""
    folder = save(tmp_path / 'weights', 'vit_digits')
    done = subprocess.run([sys.executable, '-m', 'evit_jax.predict', folder, '-', '--rate=0.5', '--top=3'],
                          input=f'{images}/a.png\nabsent.png\n', cwd=layouts.ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(f'{images}/a.png: ') and done.stdout.count('%') == 3
    assert 'cannot be read: absent.png: No such file or directory' in done.stderr
    said = [line for line in done.stderr.splitlines() if ' a second, ' not in line]  # of progress, on a slow machine
    assert 'Traceback' not in done.stderr and len(said) == 3
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, '-m', 'evit_jax.predict', folder, str(images)], stdout=writing,
                          stderr=subprocess.PIPE, cwd=layouts.ROOT, text=True)
    assert done.returncode == 141 and 'Traceback' not in done.stderr and 'rror' not in done.stderr


def test_a_plan_of_the_planner_is_followed_and_one_for_another_model_refused(program, checkpoint, images, tmp_path):
    planned = PlanFile.of(make_plan(16, 2, tokens=(6,), reduce_at=(0,)), 'vit_layouts', 16)
    (tmp_path / 'plan.json').write_text(json.dumps(planned.metadata()))
    _, out, _ = program(checkpoint, images / 'a.png', '--json', f'--plan={tmp_path / "plan.json"}')
    assert len(json.loads(out)['kept'][0]) == 7
    code, _, err = program(checkpoint, images, '--rate=0.5', f'--plan={tmp_path / "plan.json"}')
    assert (code, err) == (2, 'error: give only one of rate and plan\n')
    (tmp_path / 'plan.json').write_text(json.dumps(planned._replace(patches=64, image_size=32).metadata()))
    code, _, err = program(checkpoint, images, f'--plan={tmp_path / "plan.json"}')
    assert code == 2 and 'is for vit_layouts with 64 patches and 2 blocks, and this is vit_layouts with 16' in err
