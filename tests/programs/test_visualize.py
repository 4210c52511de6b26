"""The visualize program: the page of kept patches, the dropping experiment, and the plot of the trade-off."""

import base64
import re
import sys

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from evit_jax import cli, models
from evit_jax.checkpoints import weights
from evit_jax.inference import dropping
from evit_jax.inference.keep_rates import LabelledImage, predict_examples
from evit_jax.inference.model import VisionModel
from tests.helpers import few, layouts, program_modules
from tests.helpers.evaluations import make_rows, make_run
from tests.helpers.few import SIZE, Few
from tests.helpers.pictures import data_of
from tests.helpers.weights import random_params

small_run, checkpoint, loaded = few.small_run, few.checkpoint, few.loaded


visualize = program_modules.module_fixture('visualize')


@pytest.fixture
def run(capsys, monkeypatch, visualize):
    """Runs the program with words of a command line; returns exit code, standard output and standard error."""

    def start(*words):
        monkeypatch.setattr(sys, 'argv', ['visualize', *map(str, words)])
        with flagsaver.flagsaver():
            try:
                code = cli.run(visualize.PROGRAMS)
            except SystemExit as error:
                code = error.code
        return code or 0, *capsys.readouterr()

    return start


def test_predict_examples_gives_the_predictions_at_each_keep_rate(loaded):
    model, images = VisionModel(loaded, batch_size=4), [Few('test')[index]['image'] for index in range(3)]
    subjects = [LabelledImage(str(number), image, 'red') for number, image in enumerate(images)]
    examples, settings, problems = predict_examples(model, subjects, [0.5, 1.0])
    assert [setting.counts for setting in settings] == [(16, 9, 6), (16, 16, 16)] and not problems
    assert [setting.trained for setting in settings] == [True, False]
    assert settings[1].share == 1 > settings[0].share
    predictions = (model.with_plan(keep_rate=rate).predict(images) for rate in (0.5, 1.0))
    for example, half, whole in zip(examples, *predictions):
        for view, prediction in zip(example.views, (half, whole)):
            assert view.guesses[0][0] == prediction.top[0].name
            assert view.guesses[0][1] == pytest.approx(prediction.top[0].probability, rel=1e-4)
            assert view.right == (prediction.top[0].name == 'red')
        for number, stage in enumerate(example.views[0].stages):
            assert stage.kept == tuple(half.kept[number].tolist())
            np.testing.assert_array_equal(stage.attention, half.attention[number])
            np.testing.assert_array_equal(stage.fused_weights, half.fused_weights[number])
        for stage in example.views[1].stages:
            assert sorted(stage.kept) == list(range(16)) and stage.fused_weights is None
            assert 0 < stage.attention.sum() < 1


def test_kept_writes_a_page_of_the_test_split_and_pictures(checkpoint, tmp_path, run):
    out, pictures = tmp_path / 'new' / 'page.html', tmp_path / 'png'
    code, output, _ = run('kept', checkpoint, '--out', out, '--images=2', '--rates=0.5,0.25',
                        '--png', pictures)
    data = data_of(out.read_text())
    assert code == 0 and '2 images at 2 keep rates' in output
    assert [row['truth'] for row in data['rows']] == ['red', layouts.Colours.class_names[(SIZE - 1) % 3]]
    assert [setting['rate'] for setting in data['settings']] == ['0.25', '0.5'] and data['start'] == 1
    assert sorted(path.name for path in pictures.iterdir()) == [
        '001_0_0.25.png', '001_0_0.5.png', '002_39_0.25.png', '002_39_0.5.png']


def test_kept_with_a_merging_reducer_gives_the_token_of_each_patch(checkpoint, tmp_path, run):
    out = tmp_path / 'page.html'
    code, *printed = run('kept', checkpoint, '--out', out, '--images=2', '--reducer=tome', '--png', tmp_path / 'png')
    assert code == 0, printed
    data = data_of(out.read_text())
    # ToMe keeps at least half of the tokens.
    assert [setting['rate'] for setting in data['settings']] == ['0.5', '0.6', '0.7', '0.8', '0.9', '1']
    for row in data['rows']:
        for setting, view in zip(data['settings'], row['views'], strict=True):
            for count, stage in zip(setting['counts'][1:], view['stages'], strict=True):
                token_of_patch = np.frombuffer(base64.b64decode(stage['token_of_patch']), '<u2')
                assert len(token_of_patch) == 16 and set(token_of_patch.tolist()) == set(range(count))
                assert base64.b64decode(stage['kept']) == b'\xff\xff'  # no patch is dropped
    assert len(list((tmp_path / 'png').iterdir())) == 12


def test_kept_of_files_takes_the_true_class_from_the_folder_and_reports_unreadable_files(checkpoint, tmp_path, run):
    for place in ('green/a.png', 'other/b.png'):
        (tmp_path / place).parent.mkdir()
        Image.fromarray(Few('test')[0]['image']).save(tmp_path / place)
    (tmp_path / 'other' / 'c.png').write_text('no image')
    code, output, _ = run('kept', checkpoint, tmp_path / 'green', tmp_path / 'other', '--out',
                        tmp_path / 'page.html', '--rates=0.5')
    data = data_of((tmp_path / 'page.html').read_text())
    assert code == 1 and '2 images at 1 keep rates' in output
    assert [(row['name'], row['truth']) for row in data['rows']] == [('a.png', 'green'), ('b.png', None)]
    assert data['rows'][1]['views'][0]['right'] is None


def test_rates_are_by_default_tenths_and_the_rate_of_training(loaded, visualize):
    flags.FLAGS.mark_as_parsed()
    tenths = [number / 10 for number in range(3, 11)]
    assert visualize._rates(loaded) == tenths

    def rated(*rates):
        return loaded._replace(budget=loaded.budget._replace(rates=rates))

    assert visualize._rates(rated(0.65, 0.65)) == sorted([*tenths, 0.65])
    assert visualize._rates(rated(0.9, 0.65)) == tenths


def test_drop_writes_a_plot_and_a_table(checkpoint, tmp_path, run):
    code, output, _ = run('drop', checkpoint, '--out', tmp_path / 'x.png', '--shares=0,0.5',
                        '--images=10', '--batch=8')
    lines = (tmp_path / 'x.csv').read_text().splitlines()
    assert code == 0 and '10 images' in output
    assert lines[0].split(',') == ['dropped', *dropping.ORDERS] and [line[:6] for line in lines[1:]] == [
        '0.0000', '0.5000']
    with Image.open(tmp_path / 'x.png') as plot:
        assert len(plot.convert('RGB').getcolors(1 << 20)) > 50


def test_tradeoff_writes_a_plot_and_prints_a_table(tmp_path, run):
    code, output, _ = run('tradeoff', make_run(tmp_path / 'run'), '--out', tmp_path / 'x.png')
    assert code == 0 and 'vit 0.7' in output and '50.0' in output and (tmp_path / 'x.png').stat().st_size > 10_000


@pytest.mark.parametrize('words, message', [
    ([], 'give kept or drop or tradeoff before the flags, not nothing'), (['shout'], 'not shout'),
    (['kept'], r'give CHECKPOINT and \[IMAGES...\], not nothing'), (['drop', 'a', 'b'], "unexpected argument 'b'"),
    (['kept', 'HERE/none'], 'there is no file or folder .*none'), (['kept', 'RUN', 'HERE/*.jpg'], 'no file matches'),
    (['kept', 'RUN', 'HERE'], 'no image is in'), (['kept', 'RUN', 'HERE/a.txt'], 'none of the images can be read'),
    (['kept', 'RUN', '--rates=0.5,x'], '--rates=0.5,x is no list of numbers'),
    (['kept', 'RUN', '--rates=0'], r'keep rate 0.0 is outside \(0, 1\]'),
    (['kept', 'RUN', '--out=HERE/a.txt/x.html'], 'cannot be written'), (['kept', 'RUN', '--png=HERE/a.txt'],
                                                                     '--png: the folder .*cannot be written'),
    (['drop', 'RUN', '--out=HERE'], 'cannot be written: give another file'),
    (['drop', 'RUN', '--shares=0,1'], r'a share of 1 .*\[0, 1\)'), (['drop', 'RUN', '--rate=2'], 'keep rate 2.0'),
    (['drop', 'RUN', '--masks=HERE/none'], 'there is no folder of masks'),
    (['drop', 'RUN', '--masks=HERE'], 'there is no mask'),
    (['tradeoff', 'HERE/none'], 'there is no .*none'), (['tradeoff', 'HERE'], 'is no workdir of a run'),
    (['tradeoff', 'HERE/a.txt'], 'is no JSON with "rows"'), (['tradeoff', 'HERE/empty.json'], 'has no rows'),
    (['tradeoff', 'HERE/odd.json'], 'neither an accuracy'), (['tradeoff', 'HERE/speed.json'], 'nothing to draw')])
def test_visualize_with_wrong_arguments_ends_with_code_2_and_one_line(words, message, checkpoint, tmp_path, monkeypatch,
                                                                      run):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'empty.json').write_text('{"rows": []}')
    make_rows(tmp_path / 'odd.json', {'top1': 'high'})
    make_rows(tmp_path / 'speed.json', {'macs': 3, 'images_per_second': 4})
    monkeypatch.chdir(tmp_path)
    words = [word.replace('HERE', str(tmp_path)).replace('RUN', str(checkpoint)) for word in words]
    code, _, errors = run(*words)
    line = errors.splitlines()[-1]
    assert code == 2 and line.startswith('error: ')
    assert re.search(message, line), line


@pytest.mark.parametrize('program', ['kept', 'drop'])
@pytest.mark.parametrize('names', [('red', 'blue', 'green'), ('cat', 'dog', 'owl')])
def test_data_with_other_classes_of_the_same_number_are_refused(program, names, checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.setattr(Few, 'class_names', names)
    code, _, errors = run(program, checkpoint, '--out', tmp_path / 'x.png')
    label = 1 if names[0] == 'red' else 0
    ours, theirs = names[label], ('red', 'green')[label]
    assert code == 2 and (f"was trained on other classes: '{theirs}' is its class {label}, '{ours}' that of the data: "
                          'give a model') in errors


def test_drop_of_a_checkpoint_without_data_is_refused_with_the_flag_to_give(tmp_path, run):
    params = random_params(models.create(models.get_config('vit_layouts')))
    weights.save(tmp_path, params, {'config': {'model': {'name': 'vit_layouts', 'reduce_at': (1,)}}, 'class_names': []})
    code, _, errors = run('drop', tmp_path, '--out', tmp_path / 'x.png')
    assert code == 2 and 'give --config FILE' in errors
