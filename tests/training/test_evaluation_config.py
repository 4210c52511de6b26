"""The config of an evaluation: which values are the run's, which the file's, which the command line's."""

import logging

import pytest

from evit_jax.checkpoints import workdir
from evit_jax.training import checks, evaluation_config, inputs
from tests.helpers import layouts

RUN = {'data__mean': (0.5,) * 3, 'data__std': (0.25,) * 3, 'data__source': 'folder', 'data__path': 'pictures',
       'data__eval_crop': 0.9, 'model__distilled': True, 'keep__macs': 0.6, 'batch_size': 32}


def saved(**changes):
    return workdir.flat(layouts.config_of(**RUN | changes).to_dict())


def merge(config, run, explicit=(), from_file=True):
    return evaluation_config.merge(config, run, 'runs/a', explicit=explicit, from_file=from_file)


def test_merge_without_file_takes_everything_from_the_run():
    found = merge(layouts.config_of(model__dtype='bfloat16'), saved() | {'class_names': ['a', 'b', 'c']},
                  from_file=False)
    used = workdir.flat(found.to_dict())
    training_only = ('mixing.', 'distill.', 'teacher.', 'checkpoint.')
    assert {key: used[key] for key in used if not key.startswith(training_only)} == {
        key: value for key, value in saved().items() if not key.startswith(training_only)}


def test_merge_without_file_keeps_what_the_run_left_empty():
    run = saved(model__reduce_at=(), data__mean=())
    found = merge(layouts.config_of(keep__rates=(0.5,)), run, from_file=False)
    assert (found.model.reduce_at, found.keep.rates, found.data.mean) == ((), (), (0.485, 0.456, 0.406))


def test_merge_with_a_file_takes_model_and_preprocessing_from_the_run_and_names_the_rest(caplog):
    with caplog.at_level(logging.INFO):
        found = merge(layouts.config_of(model__name='deit_s', model__classes=9, keep__rate=0.5, batch_size=16), saved())
    assert (found.model.name, found.model.classes, found.model.distilled) == ('vit_layouts', 3, True)
    assert (found.data.mean, found.data.std, found.data.eval_crop) == ((0.5,) * 3, (0.25,) * 3, 0.9)
    assert (found.keep.rate, found.batch_size, found.data.source) == (0.5, 16, 'generated')
    line, = (record.getMessage() for record in caplog.records)
    for part in ('keep.rate 0.5 (the run has 0.7)', 'keep.macs 0.0 (the run has 0.6)', "data.path data (the run has "
                 'pictures)', 'data.eval_crop 0.9 as in the run (the config has 1.0)',
                 'model.name vit_layouts as in the run (the config has deit_s)'):
        assert part in line


def test_merge_with_a_file_takes_the_image_size_from_the_run_unless_it_is_explicit(caplog):
    with caplog.at_level(logging.INFO):
        assert merge(layouts.config_of(model__image_size=32), saved()).model.image_size == 16
        assert merge(layouts.config_of(model__image_size=32), saved(), ('model.image_size',)).model.image_size == 32
    assert 'model.image_size 16 as in the run (the config has 32)' in caplog.text
    assert 'config.model.image_size=32 as set explicitly; the run in runs/a has 16' in caplog.text


@pytest.mark.parametrize('from_file', [False, True])
def test_merge_lets_explicit_keys_win_and_names_both_values(caplog, from_file):
    config = layouts.config_of(data__mean=(0.1,) * 3, keep__rate=0.4, data__test_split='test')
    with caplog.at_level(logging.INFO):
        found = merge(config, saved(), ('data.mean', 'keep.rate', 'data.test_split'), from_file)
    assert (found.data.mean, found.data.std, found.data.test_split) == ((0.1,) * 3, (0.25,) * 3, 'test')
    assert 'config.data.mean=[0.1, 0.1, 0.1] as set explicitly; the run in runs/a has [0.5, 0.5, 0.5]' in caplog.text
    assert 'config.keep.rate=0.4 as set explicitly; the run in runs/a has 0.7' in caplog.text
    assert [record.levelname for record in caplog.records if 'data.mean' in record.getMessage()] == ['WARNING']


def test_merge_clears_what_would_hide_an_explicit_keep_rate(caplog):
    with caplog.at_level(logging.INFO):
        found = merge(layouts.config_of(keep__rate=0.4), saved(keep__tokens=(3,)), ('keep.rate',), from_file=False)
    assert (found.keep.rate, found.keep.macs, tuple(found.keep.tokens)) == (0.4, 0, ())
    assert 'keep.macs 0.0 (the run has 0.6)' in caplog.text
    kept = merge(layouts.config_of(), saved(), (), from_file=False)
    assert kept.keep.macs == 0.6


@pytest.mark.parametrize('changes, named, message', [
    ({'keep__rate': 0.4, 'keep__macs': 0.5}, ('keep.rate', 'keep.macs'), 'give only one of --config.keep.macs and'),
    ({'keep__rate': 0.4, 'model__reduce_at': ()}, ('keep.rate', 'model.reduce_at'), 'keep.rate=0.4 drops nothing')])
def test_merge_refuses_explicit_keys_that_would_change_nothing(changes, get_reducer, message):
    with pytest.raises(ValueError, match=message):
        merge(layouts.config_of(**changes), saved(), get_reducer, from_file=False)


@pytest.mark.parametrize('key', ['tokens', 'rates'])
def test_values_of_the_run_for_other_blocks_are_refused_with_the_flags(key):
    run = saved(**{f'keep__{key}': (1, 1, 1), 'keep__macs': 0.0})
    found = merge(layouts.config_of(model__reduce_at=(0, 1)), run, ('model.reduce_at',), from_file=False)
    with pytest.raises(ValueError, match=rf'config.keep.{key}=\(1, 1, 1\) has 3 values for the 2 blocks of config'
                                         rf".model.reduce_at=.*--config.keep.{key}='\(\)' and --config.keep.rate$"):
        checks.check(found)
    again = merge(layouts.config_of(model__reduce_at=(0, 1), keep__rate=0.5), run,
                  (f'keep.{key}', 'keep.rate', 'model.reduce_at'), from_file=False)
    assert not again.keep[key] and again.keep.rate == 0.5


def test_merge_takes_empty_explicit_values_from_the_run():
    found = merge(layouts.config_of(model__classes=0), saved(), ('data.mean', 'data.std', 'model.classes'))
    assert (found.data.mean, found.data.std, found.model.classes) == ((0.5,) * 3, (0.25,) * 3, 3)


@pytest.mark.parametrize('explicit', [('model.name',), ('model',), None])
def test_merge_refuses_an_explicit_model_that_is_not_the_runs(explicit):
    with pytest.raises(ValueError, match=r'runs/a holds another model \(model.name vit_layouts there, deit_s here\)'):
        merge(layouts.config_of(model__name='deit_s', model__distilled=True), saved(), explicit)


def test_merge_takes_a_model_key_that_the_run_does_not_know_as_the_models_own():
    config, run = layouts.config_of(), saved()
    del run['model.distilled']
    with config.unlocked():
        config.model.heads, config.model.activation = 12, 'gelu'  # values of a file
    assert (merge(config, run).model.heads, merge(config, run).model.activation) == (0, '')
    assert merge(config, run | {'model.heads': 4}).model.heads == 4
    with pytest.raises(ValueError, match=r'model.heads 4 there, 12 here'):
        merge(config, run | {'model.heads': 4}, ('model.heads',))


@pytest.mark.parametrize('images, devices, size', [(20, 8, 24), (20, 1, 20), (32, 1, 32), (100, 8, 32)])
def test_batch_of_a_config_is_not_larger_than_the_data(images, devices, size):
    assert evaluation_config.with_batch_for(layouts.config_of(batch_size=32), images, devices).batch_size == size


def test_merge_asks_for_data_where_the_workdir_holds_weights_alone():
    run = {key: value for key, value in saved().items() if not key.startswith('data.') or key == 'data.mean'}
    with pytest.raises(ValueError, match=r'weights alone.*--config.data.source=folder --config.data.path=DIR'):
        merge(layouts.config_of(), run, from_file=False)
    get_reducer = merge(layouts.config_of(data__source='folder'), run, ('data.source',), from_file=False)
    assert get_reducer.data.source == 'folder'
    assert merge(layouts.config_of(data__source='tfds'), run).data.source == 'tfds'


def test_held_out_images_are_opened_without_those_to_train_on(tmp_path, caplog):
    for name in ('ape', 'cat'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / 'a.png').write_text('')
    config = layouts.config_of(data__source='folder', data__path=str(tmp_path), model__classes=2, data__index_cache='')
    caplog.set_level(logging.INFO)
    assert len(inputs.open_test_source(config)) == 2
    assert f'2 images to evaluate on: split val of folder {tmp_path}, 2 classes' in caplog.text


def test_held_out_images_that_are_trained_on_are_warned_of(tmp_path, caplog):
    for name in ('ape', 'bat'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / 'a.png').write_text('')
    inputs.open_test_source(layouts.config_of(data__source='folder', data__path=str(tmp_path), model__classes=0,
                                           data__index_cache='', data__test_split='train[:100%]',
                                           data__train_split='train[:100%]'))
    assert '2 of the examples to evaluate on are trained on, too' in caplog.text
