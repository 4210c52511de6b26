"""Evaluation config: merges the values of the run, of a config file and of the command line."""

import logging

import pytest

from evit_jax.checkpoints.workdir import flat
from evit_jax.training import checks, evaluation_config, experiment, inputs
from tests.helpers import layouts

RUN = {'data__mean': (0.5,) * 3, 'data__std': (0.25,) * 3, 'data__source': 'folder', 'data__path': 'pictures',
       'data__eval_crop': 0.9, 'data__interpolation': 'bicubic', 'model__distilled': True, 'keep__macs': 0.6,
       'batch_size': 32}


def saved(**changes):
    return flat(layouts.config_of(**RUN | changes))


def merge(config, run, explicit=(), from_file=True):
    """Returns the config of an evaluation of a run."""
    values = evaluation_config.merge(flat(config), run, 'runs/a', explicit=explicit, from_file=from_file)
    return experiment.with_values(config, values)


def test_merge_without_file_uses_the_config_of_the_run():
    merged = merge(layouts.config_of(model__dtype='bfloat16'), saved() | {'class_names': ['a', 'b', 'c']},
                  from_file=False)
    used = flat(merged)
    training_only = ('mixing.', 'distill.', 'teacher.', 'checkpoint.')
    assert {key: used[key] for key in used if not key.startswith(training_only)} == {
        key: value for key, value in saved().items() if not key.startswith(training_only)}


def test_merge_without_file_keeps_empty_values_of_the_run():
    run = saved(model__reduce_at=(), data__mean=())
    merged = merge(layouts.config_of(keep__rates=(0.5,)), run, from_file=False)
    assert (merged.model.reduce_at, merged.keep.rates, merged.data.mean) == ((), (), (0.485, 0.456, 0.406))


def test_merge_with_file_uses_model_and_preprocessing_of_the_run_and_logs_the_rest(caplog):
    with caplog.at_level(logging.INFO):
        merged = merge(layouts.config_of(model__name='deit_s', model__classes=9, keep__rate=0.5, batch_size=16),
                       saved())
    assert (merged.model.name, merged.model.classes, merged.model.distilled) == ('vit_layouts', 3, True)
    assert (merged.data.mean, merged.data.std, merged.data.eval_crop) == ((0.5,) * 3, (0.25,) * 3, 0.9)
    assert (merged.keep.rate, merged.batch_size, merged.data.source) == (0.5, 16, 'generated')
    line, = (record.getMessage() for record in caplog.records)
    for part in ('keep.rate 0.5 (the run has 0.7)', 'keep.macs 0.0 (the run has 0.6)', "data.path data (the run has "
                 'pictures)', 'data.eval_crop 0.9 as in the run (the config has 1.0)',
                 'model.name vit_layouts as in the run (the config has deit_s)'):
        assert part in line


def test_merge_with_file_uses_the_image_size_of_the_run_unless_explicit(caplog):
    with caplog.at_level(logging.INFO):
        assert merge(layouts.config_of(model__image_size=32), saved()).model.image_size == 16
        assert merge(layouts.config_of(model__image_size=32), saved(), ('model.image_size',)).model.image_size == 32
    assert 'model.image_size 16 as in the run (the config has 32)' in caplog.text
    assert 'config.model.image_size=32 as set explicitly; the run in runs/a has 16' in caplog.text


@pytest.mark.parametrize('from_file', [False, True])
def test_merge_explicit_key_takes_precedence_and_logs_both_values(caplog, from_file):
    config = layouts.config_of(data__mean=(0.1,) * 3, keep__rate=0.4, data__test_split='test')
    with caplog.at_level(logging.INFO):
        merged = merge(config, saved(), ('data.mean', 'keep.rate', 'data.test_split'), from_file)
    assert (merged.data.mean, merged.data.std, merged.data.test_split) == ((0.1,) * 3, (0.25,) * 3, 'test')
    assert 'config.data.mean=[0.1, 0.1, 0.1] as set explicitly; the run in runs/a has [0.5, 0.5, 0.5]' in caplog.text
    assert 'config.keep.rate=0.4 as set explicitly; the run in runs/a has 0.7' in caplog.text
    assert [record.levelname for record in caplog.records if 'data.mean' in record.getMessage()] == ['WARNING']


def test_merge_explicit_keep_rate_clears_the_keys_that_replace_it(caplog):
    with caplog.at_level(logging.INFO):
        merged = merge(layouts.config_of(keep__rate=0.4), saved(keep__tokens=(3,)), ('keep.rate',), from_file=False)
    assert (merged.keep.rate, merged.keep.macs, tuple(merged.keep.tokens)) == (0.4, 0, ())
    assert 'keep.macs 0.0 (the run has 0.6)' in caplog.text
    assert merge(layouts.config_of(), saved(), (), from_file=False).keep.macs == 0.6


@pytest.mark.parametrize('changes, explicit, message', [
    ({'keep__rate': 0.4, 'keep__macs': 0.5}, ('keep.rate', 'keep.macs'), 'give only one of --config.keep.macs and'),
    ({'keep__rate': 0.4, 'model__reduce_at': ()}, ('keep.rate', 'model.reduce_at'), 'keep.rate=0.4 drops nothing')])
def test_merge_explicit_key_without_effect_raises(changes, explicit, message):
    with pytest.raises(ValueError, match=message):
        merge(layouts.config_of(**changes), saved(), explicit, from_file=False)


@pytest.mark.parametrize('key', ['tokens', 'rates'])
def test_check_values_of_the_run_for_other_blocks_raises_with_the_flags_to_give(key):
    run = saved(**{f'keep__{key}': (1, 1, 1), 'keep__macs': 0.0})
    merged = merge(layouts.config_of(model__reduce_at=(0, 1)), run, ('model.reduce_at',), from_file=False)
    with pytest.raises(ValueError, match=rf'config.keep.{key}=\(1, 1, 1\) has 3 values for the 2 blocks of config'
                                         rf".model.reduce_at=.*--config.keep.{key}='\(\)' and --config.keep.rate$"):
        checks.check(flat(merged))
    cleared = merge(layouts.config_of(model__reduce_at=(0, 1), keep__rate=0.5), run,
                    (f'keep.{key}', 'keep.rate', 'model.reduce_at'), from_file=False)
    assert not cleared.keep[key] and cleared.keep.rate == 0.5


def test_merge_drops_of_the_run_are_used_unless_an_explicit_key_sets_the_tokens():
    run = saved(keep__tokens=(8,), keep__drop=(3,), reducer__name='prune_merge')
    assert merge(layouts.config_of(), run, from_file=False).keep.drop == (3,)
    assert merge(layouts.config_of(keep__rate=0.5), run, ('keep.rate',), from_file=False).keep.drop == ()
    other = merge(layouts.config_of(keep__drop=(2,)), run, ('keep.drop',), from_file=False)
    assert (other.keep.tokens, other.keep.drop) == ((8,), (2,))


@pytest.mark.parametrize('changes', [{}, {'keep__tokens': (8, 4), 'model__reduce_at': (0, 1)}])
def test_check_drops_without_as_many_token_counts_raises(changes):
    config = layouts.config_of(keep__drop=(2,), reducer__name='prune_merge', **changes)
    with pytest.raises(ValueError, match=r"config.keep.drop=\(2,\) goes with config.keep.tokens=.*--config.keep.drop="):
        checks.check(flat(config))


def test_merge_empty_explicit_value_uses_that_of_the_run():
    merged = merge(layouts.config_of(model__classes=0), saved(), ('data.mean', 'data.std', 'model.classes'))
    assert (merged.data.mean, merged.data.std, merged.model.classes) == ((0.5,) * 3, (0.25,) * 3, 3)


@pytest.mark.parametrize('explicit', [('model.name',), ('model',), None])
def test_merge_explicit_model_unlike_the_run_raises(explicit):
    with pytest.raises(ValueError, match=r'runs/a holds another model \(model.name vit_layouts there, deit_s here\)'):
        merge(layouts.config_of(model__name='deit_s', model__distilled=True), saved(), explicit)


def test_merge_model_key_absent_from_the_run_has_the_value_of_the_named_model():
    config, run = layouts.config_of(), saved()
    del run['model.distilled']
    with config.unlocked():
        config.model.heads, config.model.activation = 12, 'gelu'  # values of a file
    assert (merge(config, run).model.heads, merge(config, run).model.activation) == (0, '')
    assert merge(config, run | {'model.heads': 4}).model.heads == 4
    with pytest.raises(ValueError, match=r'model.heads 4 there, 12 here'):
        merge(config, run | {'model.heads': 4}, ('model.heads',))


@pytest.mark.parametrize('images, devices, size', [(20, 8, 24), (20, 1, 20), (32, 1, 32), (100, 8, 32)])
def test_batch_size_for_fewer_images_than_a_batch_is_reduced(images, devices, size):
    assert evaluation_config.batch_size_for(images, devices, 32) == size


def test_merge_weights_alone_without_data_source_raises():
    run = {key: value for key, value in saved().items() if not key.startswith('data.') or key == 'data.mean'}
    with pytest.raises(ValueError, match=r'weights alone.*--config.data.source=folder --config.data.path=DIR'):
        merge(layouts.config_of(), run, from_file=False)
    assert merge(layouts.config_of(data__source='folder'), run, ('data.source',), from_file=False
                 ).data.source == 'folder'
    assert merge(layouts.config_of(data__source='tfds'), run).data.source == 'tfds'


def test_open_held_out_without_training_images_opens(tmp_path, caplog):
    for name in ('ape', 'cat'):
        (tmp_path / 'val' / name).mkdir(parents=True)
        (tmp_path / 'val' / name / 'a.png').write_text('')
    config = layouts.config_of(data__source='folder', data__path=str(tmp_path), model__classes=2, data__index_cache='')
    caplog.set_level(logging.INFO)
    assert len(inputs.open_test_source(flat(config))) == 2
    assert f'2 images to evaluate on: split val of folder {tmp_path}, 2 classes' in caplog.text


def test_open_held_out_overlap_with_training_images_warns(tmp_path, caplog):
    for name in ('ape', 'bat'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        (tmp_path / 'train' / name / 'a.png').write_text('')
    inputs.open_test_source(flat(layouts.config_of(
        data__source='folder', data__path=str(tmp_path), model__classes=0, data__index_cache='',
        data__test_split='train[:100%]', data__train_split='train[:100%]')))
    assert '2 of the examples to evaluate on are trained on, too' in caplog.text
