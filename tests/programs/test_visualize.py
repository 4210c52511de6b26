"""The programs that show: the page of what is kept, the experiment of dropping patches, the plot of the trade-off."""

import base64
import dataclasses
import re
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from evit_jax import cli, models
from evit_jax.checkpoints import weights
from evit_jax.data import sources
from evit_jax.inference import dropping, load_model
from evit_jax.inference.held_out import spread
from evit_jax.inference.looking import Subject, look
from evit_jax.inference.predictor import Predictor
from evit_jax.reduction.plan import make_plan
from tests.helpers import doors, layouts
from tests.helpers.evaluations import make_rows, make_run
from tests.helpers.pictures import data_of

SIZE = 40


class Few(layouts.Colours):
    sizes = {'train': 8, 'test': SIZE}


class Scratched(Few):
    """The same with other pixels in the patches that are on the object."""

    def __getitem__(self, index):
        example = super().__getitem__(index)
        on_object = dropping.object_patches(example['mask'][None] > 127, 16).reshape(4, 4).repeat(4, 0).repeat(4, 1)
        return example | {'image': np.where(on_object[..., None], 255 - example['image'], example['image'])}


@pytest.fixture(scope='module', autouse=True)
def least():
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        patch.setattr(sources, 'open_source', lambda name, split, **_: Few(split))
        patch.setattr(cli, 'configure_logging', lambda: None)
        yield


def save(folder, **config):
    """Weights that nobody trained, under which images differ in their class."""
    config = layouts.config_of(keep__rate=0.5, model__reduce_at=(0, 1), **config).to_dict()
    model, rng = models.create(dataclasses.replace(layouts.SHAPE, classes=3)), np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(leaf.dtype),
                          jax.eval_shape(model.init, jax.random.key(0)))
    images = np.array([Few('test')[index]['image'] for index in range(8)]) / np.float32(100)
    logits, _ = model.apply(params, images, make_plan(16, 2, reduce_at=()))
    params['head']['bias'] -= np.asarray(logits.mean(0))
    weights.save(folder, params, {'config': config, 'class_names': layouts.Colours.class_names})
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def trained(checkpoint):
    return load_model(checkpoint)


visualize = doors.imported('visualize')


@pytest.fixture
def run(capsys, monkeypatch, visualize):
    """Words of a command line -> exit code, output and what was said of errors."""

    def start(*words):
        monkeypatch.setattr(sys, 'argv', ['visualize', *map(str, words)])
        with flagsaver.flagsaver():
            try:
                code = cli.run(visualize.PROGRAMS)
            except SystemExit as error:
                code = error.code
        return code or 0, *capsys.readouterr()

    return start


def test_each_rate_shows_what_a_prediction_at_this_rate_keeps(trained):
    predictor, images = Predictor(trained, batch_size=4), [Few('test')[index]['image'] for index in range(3)]
    subjects = [Subject(str(number), image, 'red') for number, image in enumerate(images)]
    examples, settings, problems = look(predictor, subjects, [0.5, 1.0])
    assert [setting.counts for setting in settings] == [(16, 9, 6), (16, 16, 16)] and not problems
    assert [setting.trained for setting in settings] == [True, False]
    assert settings[1].share == 1 > settings[0].share
    for example, half, whole in zip(examples, predictor.predict(images, rate=0.5), predictor.predict(images, rate=1.0)):
        for view, prediction in zip(example.views, (half, whole)):
            assert view.guesses[0][0] == prediction.top[0].name
            assert view.guesses[0][1] == pytest.approx(prediction.top[0].probability, rel=1e-4)
            assert view.right == (prediction.top[0].name == 'red')
        for number, stage in enumerate(example.views[0].stages):
            assert stage.kept == tuple(half.kept[number].tolist())
            np.testing.assert_array_equal(stage.attention, half.attention[number])
            np.testing.assert_array_equal(stage.fused_weights, half.origin[number])
        for stage in example.views[1].stages:
            assert sorted(stage.kept) == list(range(16)) and stage.fused_weights is None
            assert 0 < stage.attention.sum() < 1


def test_a_patch_is_either_kept_or_in_a_fused_token(trained):
    found, = Predictor(trained, batch_size=1).predict([Few('test')[0]['image']], rate=0.5)
    for kept, attention, origin in zip(found.kept, found.attention, found.origin):
        there = np.isin(np.arange(16), kept)
        assert not (there & (origin > 0)).any()
        gone_here = ~there & ~np.isnan(attention)
        np.testing.assert_allclose(origin[gone_here], attention[gone_here], rtol=1e-6)
    assert ((found.origin[0] > 0) == ~np.isin(np.arange(16), found.kept[0])).all()


def test_a_page_of_the_test_split_and_pictures(checkpoint, tmp_path, run):
    out, pictures = tmp_path / 'new' / 'page.html', tmp_path / 'png'
    code, said, _ = run('kept', checkpoint, '--out', out, '--images=2', '--rates=0.5,0.25',
                        '--png', pictures)
    data = data_of(out.read_text())
    assert code == 0 and '2 images at 2 keep rates' in said
    assert [row['truth'] for row in data['rows']] == ['red', layouts.Colours.class_names[(SIZE - 1) % 3]]
    assert [setting['rate'] for setting in data['settings']] == ['0.25', '0.5'] and data['start'] == 1
    assert sorted(path.name for path in pictures.iterdir()) == [
        '001_0_0.25.png', '001_0_0.5.png', '002_39_0.25.png', '002_39_0.5.png']


def test_a_page_of_merged_tokens_says_which_token_each_patch_is_in(checkpoint, tmp_path, run):
    out = tmp_path / 'page.html'
    code, *said = run('kept', checkpoint, '--out', out, '--images=2', '--reducer=tome', '--png', tmp_path / 'png')
    assert code == 0, said
    data = data_of(out.read_text())
    assert [setting['rate'] for setting in data['settings']] == ['0.5', '0.6', '0.7', '0.8', '0.9', '1']  # from a half
    for row in data['rows']:
        for setting, view in zip(data['settings'], row['views'], strict=True):
            for count, stage in zip(setting['counts'][1:], view['stages'], strict=True):
                token_of_patch = np.frombuffer(base64.b64decode(stage['token_of_patch']), '<u2')
                assert len(token_of_patch) == 16 and set(token_of_patch.tolist()) == set(range(count))
                assert base64.b64decode(stage['kept']) == b'\xff\xff'  # nothing is gone
    assert len(list((tmp_path / 'png').iterdir())) == 12


def test_a_page_of_files_knows_the_truth_by_the_folder_and_tells_what_is_no_image(
        checkpoint, tmp_path, run):
    for place in ('green/a.png', 'other/b.png'):
        (tmp_path / place).parent.mkdir()
        Image.fromarray(Few('test')[0]['image']).save(tmp_path / place)
    (tmp_path / 'other' / 'c.png').write_text('no image')
    code, said, _ = run('kept', checkpoint, tmp_path / 'green', tmp_path / 'other', '--out',
                        tmp_path / 'page.html', '--rates=0.5')
    data = data_of((tmp_path / 'page.html').read_text())
    assert code == 1 and '2 images at 1 keep rates' in said
    assert [(row['name'], row['truth']) for row in data['rows']] == [('a.png', 'green'), ('b.png', None)]
    assert data['rows'][1]['views'][0]['right'] is None


def test_the_rates_are_tenths_and_the_one_trained_with(trained, visualize):
    flags.FLAGS.mark_as_parsed()
    tenths = [number / 10 for number in range(3, 11)]
    assert visualize._rates(trained) == tenths

    def rated(*rates):
        return trained._replace(budget=trained.budget._replace(rates=rates))

    assert visualize._rates(rated(0.65, 0.65)) == sorted([*tenths, 0.65])
    assert visualize._rates(rated(0.9, 0.65)) == tenths


def find(trained, source=None, **how):
    return dropping.drop_patches(trained, source or Few('test'), **{
        'shares': (0, 0.25, 0.5, 0.75), 'batch_size': 16} | how)


@pytest.fixture(scope='module')
def found(trained):
    return find(trained)


def test_where_nothing_is_dropped_accuracy_is_that_of_the_dense_model(trained, found):
    images = [Few('test')[index]['image'] for index in range(SIZE)]
    predictions = Predictor(trained, batch_size=8).predict(images, rate=1.0)
    right = np.mean([prediction.top[0].label == index % 3 for index, prediction in enumerate(predictions)])
    assert found.shares == (0, 0.25, 0.5, 0.75) and found.images == SIZE
    assert {values[0] for values in found.accuracy.values()} == {right}
    assert len({tuple(values) for values in found.accuracy.values()}) > 2


def test_what_is_found_depends_on_the_seed_and_not_on_the_batch(trained, found):
    again, other = find(trained, batch_size=8), find(trained, seed=1)
    for order, values in found.accuracy.items():
        np.testing.assert_allclose(again.accuracy[order], values)
        assert np.array_equal(values, other.accuracy[order]) or 'attended' not in order
    assert any(not np.array_equal(values, other.accuracy[order]) for order, values in found.accuracy.items())


def test_dropped_patches_are_not_seen(trained, found):
    scratched = find(trained, Scratched('test'))
    first, last = dropping.ORDERS[:2]
    assert found.on_object == scratched.on_object < 0.75
    assert found.accuracy[first][-1] == scratched.accuracy[first][-1]  # the object is gone, whatever it was
    assert any(found.accuracy[last][number] != scratched.accuracy[last][number] for number in range(4))


def test_orders_begin_with_what_they_are_named_after():
    rng = np.random.default_rng(0)
    on_object, attention, draws = rng.random((5, 16)) < 0.3, rng.random((5, 16)), rng.random((5, 16))
    orders = dropping._orders(on_object, attention, draws)
    assert tuple(orders) == dropping.ORDERS
    for ids in orders.values():
        np.testing.assert_array_equal(np.sort(ids, 1), np.tile(range(16), (5, 1)))
    first, last, _, least, most = orders.values()
    for row, many in enumerate(on_object.sum(1)):
        assert on_object[row][first[row, :many]].all() and on_object[row][last[row, 16 - many:]].all()
        assert (np.diff(attention[row][least[row]]) > 0).all() and (np.diff(attention[row][most[row]]) < 0).all()


def test_images_without_an_object_are_left_out(trained):
    class Half(Few):
        def __getitem__(self, index):
            example = super().__getitem__(index)
            return example | {'mask': example['mask'] * np.uint8(index % 2)}

    assert find(trained, Half('test'), shares=(0,)).images == SIZE // 2


def test_drop_writes_a_plot_and_a_table(checkpoint, tmp_path, run):
    code, said, _ = run('drop', checkpoint, '--out', tmp_path / 'x.png', '--shares=0,0.5',
                        '--images=10', '--batch=8')
    lines = (tmp_path / 'x.csv').read_text().splitlines()
    assert code == 0 and '10 images' in said
    assert lines[0].split(',') == ['dropped', *dropping.ORDERS] and [line[:6] for line in lines[1:]] == [
        '0.0000', '0.5000']
    with Image.open(tmp_path / 'x.png') as plot:
        assert len(plot.convert('RGB').getcolors(1 << 20)) > 50


def test_spread_takes_from_end_to_end():
    assert spread(10, 3) == [0, 4, 9] and spread(2, 5) == [0, 1] and spread(7, 1) == [0]
    with pytest.raises(ValueError, match='no images'):
        spread(0, 3)


def test_tradeoff_writes_a_plot_and_prints_a_table(tmp_path, run):
    code, said, _ = run('tradeoff', make_run(tmp_path / 'run'), '--out', tmp_path / 'x.png')
    assert code == 0 and 'vit 0.7' in said and '50.0' in said and (tmp_path / 'x.png').stat().st_size > 10_000


@pytest.mark.parametrize('words, said', [
    ([], 'give kept or drop or tradeoff before the flags, not nothing'), (['shout'], 'not shout'),
    (['kept'], r'give CHECKPOINT and \[IMAGES...\], not nothing'), (['drop', 'a', 'b'], "what is 'b' for"),
    (['kept', 'HERE/none'], 'there is no folder .*none'), (['kept', 'RUN', 'HERE/*.jpg'], 'no file matches'),
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
def test_what_cannot_be_is_told_in_one_line(words, said, checkpoint, tmp_path, monkeypatch, run):
    (tmp_path / 'a.txt').write_text('text')
    (tmp_path / 'empty.json').write_text('{"rows": []}')
    make_rows(tmp_path / 'odd.json', {'top1': 'high'})
    make_rows(tmp_path / 'speed.json', {'macs': 3, 'images_per_second': 4})
    monkeypatch.chdir(tmp_path)
    words = [word.replace('HERE', str(tmp_path)).replace('RUN', str(checkpoint)) for word in words]
    code, _, errors = run(*words)
    line = errors.splitlines()[-1]
    assert code == 2 and line.startswith('error: ')
    assert re.search(said, line), line


@pytest.mark.parametrize('program', ['kept', 'drop'])
@pytest.mark.parametrize('names', [('red', 'blue', 'green'), ('cat', 'dog', 'owl')])
def test_data_of_other_classes_with_the_same_number_are_refused(program, names, checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.setattr(Few, 'class_names', names)
    code, _, errors = run(program, checkpoint, '--out', tmp_path / 'x.png')
    label = 1 if names[0] == 'red' else 0
    ours, theirs = names[label], ('red', 'green')[label]
    assert code == 2 and (f"was trained on other classes: '{theirs}' is its class {label}, '{ours}' that of the data: "
                          'give a model') in errors


def test_a_checkpoint_that_names_no_data_asks_for_a_config(tmp_path, run):
    params = models.create(models.get_config('vit_layouts')).init(jax.random.key(0))
    weights.save(tmp_path, params, {'config': {'model': {'name': 'vit_layouts', 'reduce_at': (1,)}}, 'class_names': []})
    code, _, errors = run('drop', tmp_path, '--out', tmp_path / 'x.png')
    assert code == 2 and 'give --config FILE' in errors
