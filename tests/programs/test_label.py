"""Tests of the program that makes label maps: from a model, after an interruption, and invalid arguments."""

import dataclasses
import json
import pickle
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax import models
from evit_jax.checkpoints import weights
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.workdir import flat
from evit_jax.data import sources
from evit_jax.data.sources import DigitsSource
from evit_jax.data.token_labels import label_maps
from evit_jax.data.token_labels.label_maps import Entry, LabelMap, LabelMaps, LabelMapsMetadata
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.inference.annotator import Annotator, top_logits
from evit_jax.models.lvvit import LVViTConfig
from evit_jax.reduction.plan import make_plan
from evit_jax.training import checks, experiment, loop, step
from tests.helpers import label_program, layouts
from tests.helpers.label_program import SIZES, open_train
from tests.helpers.toys import Broken
from tests.helpers.weights import random_params

digits, label, run = label_program.digits, label_program.label, label_program.run  # fixtures
CONFIG = {'data__source': 'digits', 'model__classes': 10, 'batch_size': 8, 'keep__rate': 0.5}


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder, shape = tmp_path_factory.mktemp('weights'), dataclasses.replace(layouts.SHAPE, classes=10)
    metadata = {'config': layouts.config_of(**CONFIG).to_dict(), 'class_names': DigitsSource.class_names}
    weights.save(folder, random_params(models.create(shape), 1), metadata)
    return folder


@pytest.fixture(scope='module')
def made(checkpoint, tmp_path_factory):
    """Label maps of the digits, written without the program."""
    folder, source = tmp_path_factory.mktemp('made'), open_train()
    annotator = Annotator(load_model(checkpoint), batch_size=16)
    metadata = LabelMapsMetadata(str(annotator), 'digits', source.class_names, 10, 40, annotator.top, annotator.grid)
    label_maps.write(folder, metadata, lambda start: annotator.entries(source, start, lambda: None))
    return LabelMaps(folder)


def assert_same_maps(got, want):
    for number in range(SIZES['train']):
        example = open_train()[number]['id']
        for a, b in zip(got[example], want[example]):
            np.testing.assert_array_equal(a, b)


def test_annotator_applies_the_class_head_to_each_patch_token(checkpoint, made):
    trained, example = load_model(checkpoint), open_train()[7]
    model, image = models.create(trained.config), EvalTransform(16, crop=None)(example['image'])
    images = step.normalise(jnp.asarray(image[None]), trained.mean, trained.std)
    apply = jax.jit(model.apply, static_argnums=2, static_argnames='patch_tokens')
    _, outputs = apply(trained.params, images, make_plan(16, 2, rate=1.0, reduce_at=()), patch_tokens=True)
    head = trained.params['head']
    probability = jax.nn.softmax(outputs['patch_tokens'][0] @ head['kernel'] + head['bias'])
    found = made[example['id']]
    assert found.value.shape == found.index.shape == (5, 4, 4)
    value, index = (of.reshape(5, 16).T for of in found)
    np.testing.assert_array_equal(index, np.argsort(-probability, axis=-1)[:, :5])
    got = np.exp(value) / (np.exp(value).sum(-1, keepdims=True) + 5)  # five others have logit 0
    np.testing.assert_allclose(got, np.take_along_axis(np.asarray(probability), index, -1), rtol=5e-3)


@pytest.mark.parametrize('top', [2, 6])
def test_top_logits_preserve_the_probabilities(top):
    logits = jax.random.normal(jax.random.key(0), (3, 6)) * 4 - 7
    value, index = top_logits(logits, top)
    rest = 6 - top
    got = np.exp(value) / (np.exp(value).sum(-1, keepdims=True) + rest)
    np.testing.assert_allclose(got, np.take_along_axis(np.asarray(jax.nn.softmax(logits)), index, -1), rtol=1e-5)


def test_label_makes_maps_that_training_reads(checkpoint, made, tmp_path, run):
    out = tmp_path / 'maps'
    assert run(checkpoint, f'--out={out}', '--batch=16')[0] == 0
    assert_same_maps(LabelMaps(out), made)
    metadata = json.loads((out / 'label_maps.json').read_text())
    assert metadata['annotator'].startswith('vit_layouts at 16 pixels, step 0') and metadata['data'] == 'digits train'
    laid = experiment.setup(layouts.config_of(**CONFIG, data__token_labels=str(out)))
    batches = laid.train_batches(3)
    batch = next(batches)
    batches.close()
    assert {name: (value.shape, value.dtype) for name, value in batch.items() if name != 'failed'} == {
        name: (of.shape, of.dtype) for name, of in laid.abstract_batch().items()}
    assert batch['token_value'].shape == (8, 16, 10) and batch['label_index'].shape == (8, 10)
    assert not batch['failed'].size


def test_label_makes_maps_of_rectangles_that_training_reads(checkpoint, tmp_path, run):
    out = tmp_path / 'maps'
    assert run(checkpoint, f'--out={out}', '--batch=16', '--image_size=16x24')[0] == 0
    maps = LabelMaps(out)
    assert maps.metadata.grid == (4, 6) and maps[open_train()[0]['id']].value.shape == (5, 4, 6)
    setup = experiment.setup(layouts.config_of(**CONFIG, data__token_labels=str(out), model__image_width=24))
    batches = setup.train_batches(0)
    batch = next(batches)
    batches.close()
    assert batch['image'].shape == (8, 16, 24, 3) and batch['token_value'].shape == (8, 24, 10)


TOKENS = CONFIG | {'model__name': 'lvvit_least', 'model__drop_path': 0.0, 'batch_size': 16, 'epochs': 2,
                   'log__pictures': 0, 'ema_decay': 0.0, 'checkpoint__best': ''}


@pytest.mark.parametrize('width', [pytest.param(0, id='square', marks=pytest.mark.slow),
                                   pytest.param(24, id='rectangle')])
def test_train_lvvit_on_the_maps_of_another_model(width, made, tmp_path, monkeypatch):
    monkeypatch.setitem(models.CONFIGS, 'lvvit_least', LVViTConfig(
        image_size=16, patch_size=4, width=16, depth=2, heads=2, stem_width=4))
    config = layouts.config_of(**TOKENS, data__token_labels=str(made.folder), model__image_width=width)
    loop.train(config, tmp_path)
    found = layouts.records(tmp_path)
    assert len(found) == 5
    for row in found:
        np.testing.assert_allclose(row['train/loss'], row['train/loss/labels'] + row['train/loss/tokens'], rtol=1e-5)
    config.data.token_labels = str(tmp_path / 'moved away')
    assert loop.evaluate_workdir(config, tmp_path)['images'] == SIZES['test']


@pytest.mark.parametrize('changes, message', [
    ({'model__name': 'vit_layouts'}, 'a head for patch tokens, which vit_layouts lacks'),
    ({'distill__kind': 'self'}, 'both decide the objective'),
    ({'mixing__mixup': 0.8}, 'MixToken replaces mixup and cutmix')])
def test_check_token_labels_with_incompatible_settings_raises(monkeypatch, changes, message):
    monkeypatch.setitem(models.CONFIGS, 'lvvit_least', LVViTConfig(image_size=16, patch_size=4, width=16, heads=2))
    with pytest.raises(ValueError, match=message):
        checks.check(flat(layouts.config_of(**TOKENS | {'data__token_labels': 'x'} | changes)))


def test_setup_without_token_labels_has_images_and_labels_only():
    assert set(experiment.setup(layouts.config_of(**CONFIG)).abstract_batch()) == {'image', 'label'}


def test_write_interrupted_continues_to_the_same_maps(checkpoint, made, tmp_path):
    source, annotator = open_train(), Annotator(load_model(checkpoint), batch_size=16)
    began = []

    def until(stop):
        def entries(start):
            began.append(start)
            for number, entry in enumerate(annotator.entries(source, start, lambda: None), start):
                if number == stop:
                    raise KeyboardInterrupt
                yield entry
        return entries

    for stop in (5, 29):
        with pytest.raises(KeyboardInterrupt):
            label_maps.write(tmp_path, made.metadata, until(stop))
        with pytest.raises(ValueError, match=f'are of {stop} of 40 examples so far'):
            LabelMaps(tmp_path)
    label_maps.write(tmp_path, made.metadata, until(None))
    label_maps.write(tmp_path, made.metadata, until(None))  # nothing is left to do
    assert began == [0, 5, 29]
    assert_same_maps(LabelMaps(tmp_path), made)


def test_label_stopped_by_sigterm_keeps_maps_and_continues(checkpoint, made, tmp_path, run, monkeypatch):
    entries = Annotator.entries

    def stop_at_20(self, source, start, check):
        for number, entry in enumerate(entries(self, source, start, check), start):
            if number == 20:
                signal.raise_signal(signal.SIGTERM)
            yield entry

    monkeypatch.setattr(Annotator, 'entries', stop_at_20)
    code, _ = run(checkpoint, f'--out={tmp_path}', '--batch=8')
    assert code == 75 and json.loads((tmp_path / 'label_maps.json').read_text())['done'] == 24
    monkeypatch.setattr(Annotator, 'entries', entries)
    assert run(checkpoint, f'--out={tmp_path}', '--batch=8')[0] == 0
    assert_same_maps(LabelMaps(tmp_path), made)


def test_write_unreadable_examples_have_no_map(tmp_path, checkpoint):
    annotator, source = Annotator(load_model(checkpoint), batch_size=4), Broken(10)
    metadata = LabelMapsMetadata('x', 'x', (), 10, 10, annotator.top, annotator.grid)
    assert label_maps.write(tmp_path, metadata, lambda start: annotator.entries(source, start, lambda: None)) == 4
    maps = LabelMaps(tmp_path)
    assert [number for number in range(10) if f'number {number}' in maps] == [0, 1, 4, 5, 6, 9]


def test_label_maps_pickled_are_equal_and_raise_for_an_unknown_id(made):
    again = pickle.loads(pickle.dumps(made))
    assert_same_maps(again, made)
    with pytest.raises(ValueError, match="no label map of example 'another'"):
        made['another']


@pytest.mark.parametrize('words, message', [
    ([], 'either a CHECKPOINT or --published'), (['{checkpoint}'], '--out DIR'),
    (['{checkpoint}', '--published=x', '--out={out}'], 'either a CHECKPOINT'),
    (['{out}/none', '--out={out}'], 'there is no file or folder'),
    (['{checkpoint}', '--out={out}', '--image_size=17'], 'not divisible by the patch size'),
    (['{checkpoint}', '--out=gs://a/b'], 'mounted folders only'),
    (['--published={out}', '--out={out}'], 'there is no published label map')])
def test_label_invalid_arguments_exit_before_writing(words, message, checkpoint, tmp_path, run):
    code, errors = run(*(word.format(checkpoint=checkpoint, out=tmp_path / 'out') for word in words))
    assert code == 2 and message in errors.splitlines()[-1]
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('names, message', [
    (('a', 'b', 'c'), 'has 10 classes, the data have 3'),
    (('zero', *'123456789'), "'0' is its class 0, 'zero' that of the data")])
def test_label_model_of_other_classes_exits(names, message, checkpoint, tmp_path, run, monkeypatch):
    monkeypatch.setattr(layouts.Colours, 'class_names', names)
    monkeypatch.setattr(layouts.Colours, 'num_classes', len(names))
    monkeypatch.setattr(sources, 'open_source', lambda name, split, **_: layouts.Colours(split))
    code, errors = run(checkpoint, f'--out={tmp_path / "out"}')
    assert code == 2 and message in errors.splitlines()[-1] and not (tmp_path / 'out').exists()


def test_label_maps_of_another_annotator_are_not_overwritten(checkpoint, tmp_path, run):
    assert run(checkpoint, f'--out={tmp_path}')[0] == 0
    before = (tmp_path / 'values.npy').read_bytes()
    code, errors = run(checkpoint, f'--out={tmp_path}', '--image_size=8')
    assert code == 2 and "holds label maps with annotator 'vit_layouts at 16 pixels" in errors
    assert (tmp_path / 'values.npy').read_bytes() == before


def small(folder, **changes):
    metadata = {'annotator': 'x', 'data': 'a test', 'class_names': DigitsSource.class_names, 'classes': 10,
             'examples': 2, 'top': 2, 'grid': (2, 2)} | changes
    blank = LabelMap(np.zeros((metadata['top'], 2, 2)), np.zeros((metadata['top'], 2, 2), int))
    entries = [Entry(f'e {number}', blank) for number in range(2)]
    label_maps.write(folder, LabelMapsMetadata(**metadata), lambda start: iter(entries[start:]))
    return folder


@pytest.mark.parametrize('changes, message', [
    ({'classes': 9, 'class_names': ()}, 'are of 9 classes, the data have 10'),
    ({'class_names': tuple('9876543210')}, "'9' is class 0 there, and '0' in the data"),
    ({}, r'hold none of example .* they are of a test')])
def test_setup_label_maps_of_other_data_raise(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        experiment.setup(layouts.config_of(**CONFIG, data__token_labels=str(small(tmp_path, **changes))))


def test_label_maps_absent_or_damaged_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'python -m evit_jax\.label'):
        experiment.setup(layouts.config_of(**CONFIG, data__token_labels=str(tmp_path / 'none')))
    small(tmp_path)
    np.save(tmp_path / 'values.npy', np.zeros((2, 2, 3, 3), np.float16))
    with pytest.raises(ValueError, match=r'values.npy.* float16 .2, 2, 3, 3., and not float16 .2, 2, 2, 2.'):
        LabelMaps(tmp_path)
    (tmp_path / 'values.npy').write_bytes(b'no')
    with pytest.raises(ValueError, match=r'values.npy.* cannot be opened'):
        LabelMaps(tmp_path)
    (tmp_path / 'label_maps.json').write_text('{"format": 2}')
    with pytest.raises(ValueError, match='is not a file of evit_jax'):
        LabelMaps(tmp_path)
