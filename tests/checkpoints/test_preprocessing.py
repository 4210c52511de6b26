"""Mean, std and crop of weights that a run begins from, in the place of what its config leaves open."""

import json
import logging

import pytest

from evit_jax.checkpoints import preprocessing, workdir
from evit_jax.data import splits
from evit_jax.inference import held_out
from tests.helpers import layouts

WEIGHTS = {'data': {'mean': [0.5] * 3, 'std': [0.2] * 3, 'eval_crop': 0.9}}


@pytest.fixture
def weights(monkeypatch):
    """Weights with a config of their own at 'weights', and a run that continues at 'begun'."""
    monkeypatch.setattr(preprocessing, 'read_about', lambda path: {'config': WEIGHTS} if path == 'weights' else {})
    monkeypatch.setattr(preprocessing, 'newest_step', lambda path: 3 if path == 'begun' else None)
    monkeypatch.setattr(workdir, 'saved_config', lambda path: {'data.mean': [0.4] * 3, 'data.std': [0.1] * 3})


@pytest.mark.parametrize('init_from, place, mean, std', [
    ('', 'new', 0.485, 0.229), (None, 'new', 0.485, 0.229), ('weights', 'new', 0.5, 0.2), ('gone', 'begun', 0.4, 0.1)])
def test_resolve_of_an_empty_mean_is_that_of_the_run_the_weights_or_imagenet(weights, init_from, place, mean, std):
    config = layouts.config_of(init_from=init_from)
    found = preprocessing.resolve(config, place)
    assert (found.data.mean[0], found.data.std[0]) == (mean, std)
    assert preprocessing.filled(found) is found and config.data.mean == ()


def test_resolve_says_nothing_of_weights_that_are_not_there(weights, caplog):
    preprocessing.resolve(layouts.config_of(init_from='gone', data__mean=(0.3,) * 3, data__eval_crop=0.9), 'new')
    assert not caplog.records


def test_resolve_keeps_explicit_values_and_warns_where_the_weights_have_others(weights, caplog):
    config = layouts.config_of(init_from='weights', data__mean=(0.3,) * 3, data__std=(0.2,) * 3, data__eval_crop=0.875)
    found = preprocessing.resolve(config, 'new')
    assert (found.data.mean, found.data.std, found.data.eval_crop) == ((0.3,) * 3, (0.2,) * 3, 0.875)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert ("data.mean is [0.3, 0.3, 0.3] here, and [0.5, 0.5, 0.5] where the weights of weights were trained: give "
            "--config.data.mean='(0.5, 0.5, 0.5)'") in warnings[0]
    assert 'data.eval_crop is 0.875 here, and 0.9' in warnings[1]


def test_resolve_warns_of_nothing_where_values_agree_or_the_run_continues(weights, caplog):
    preprocessing.resolve(layouts.config_of(init_from='weights', data__eval_crop=0.9), 'new')
    preprocessing.resolve(layouts.config_of(init_from='weights', data__mean=(0.3,) * 3, data__std=(1.0,) * 3), 'begun')
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize('asked, kept, again', [('auto', 'auto', 'auto'), ('test', 'test[:100%]', 'test[:100%]'),
                                                ('val', 'val', 'val')])
def test_explicit_test_split_is_kept_apart_from_that_of_older_runs(tmp_path, asked, kept, again):
    config = preprocessing.resolve(layouts.config_of(data__test_split=asked), tmp_path)
    assert config.data.test_split == kept
    workdir.write_config(tmp_path, {'config': config.to_dict()})
    assert workdir.saved_config(tmp_path)['data.test_split'] == again


@pytest.mark.parametrize('asked, opened', [('test', 'auto'), ('test[:100%]', 'test[:100%]'), ('val', 'val')])
def test_held_out_of_a_checkpoint_is_the_split_that_its_run_was_evaluated_on(monkeypatch, asked, opened):
    config = {'config': {'data': {'source': 'folder', 'test_split': asked}}}
    monkeypatch.setattr(held_out, 'read_about', lambda path: config)
    monkeypatch.setattr(held_out.sources, 'open_source', lambda name, split, **_: split)
    assert held_out.held_out('a', 3) == opened
    assert held_out.held_out('a', 3, config['config']) == asked  # the split of a new file


def test_test_in_the_config_of_an_older_run_means_the_split_to_evaluate_on(tmp_path):
    (tmp_path / workdir.CONFIG_FILE).write_text(json.dumps({'data.test_split': 'test'}))
    assert workdir.saved_config(tmp_path)['data.test_split'] == splits.AUTO
