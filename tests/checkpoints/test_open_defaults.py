"""Open keys of a config: mean, std and dtype come from the run, the initial weights, the platform or ImageNet."""

import json
import logging

import pytest

from evit_jax.checkpoints import open_defaults, workdir
from evit_jax.data import splits
from evit_jax.inference import held_out
from evit_jax.training import experiment
from tests.helpers import layouts

WEIGHTS = {'data': {'mean': [0.5] * 3, 'std': [0.2] * 3, 'eval_crop': 0.9, 'interpolation': 'bilinear'}}
RUN = {'data.mean': [0.4] * 3, 'data.std': [0.1] * 3, 'model.dtype': 'bfloat16'}


@pytest.fixture
def weights(monkeypatch):
    """Weights with a config at the path 'weights', and a run with a checkpoint at the path 'begun'."""
    monkeypatch.setattr(open_defaults, 'read_metadata', lambda path: {'config': WEIGHTS} if path == 'weights' else {})
    monkeypatch.setattr(open_defaults, 'newest_step', lambda path: 3 if path == 'begun' else None)
    monkeypatch.setattr(workdir, 'saved_config', lambda path: RUN)


def resolve(config, path='new'):
    """Returns the config of a training on a CPU."""
    return experiment.with_values(config, open_defaults.resolve_for_training(workdir.flat(config), path, 'cpu'))


@pytest.mark.parametrize('init_from, path, mean, std', [
    ('', 'new', 0.485, 0.229), (None, 'new', 0.485, 0.229), ('weights', 'new', 0.5, 0.2), ('gone', 'begun', 0.4, 0.1)])
def test_resolve_empty_mean_takes_that_of_the_run_the_weights_or_imagenet(weights, init_from, path, mean, std):
    config = layouts.config_of(init_from=init_from)
    resolved = resolve(config, path)
    assert (resolved.data.mean[0], resolved.data.std[0]) == (mean, std)
    assert open_defaults.resolve(workdir.flat(resolved), platform='tpu') == {} and config.data.mean == ()


@pytest.mark.parametrize('dtype, path, expected', [
    ('auto', 'new', 'float32'), ('auto', 'begun', 'bfloat16'), ('float32', 'begun', 'float32')])
def test_resolve_open_dtype_takes_that_of_the_run_or_the_platform(weights, dtype, path, expected):
    assert resolve(layouts.config_of(model__dtype=dtype), path).model.dtype == expected


@pytest.mark.parametrize('config, path, expected', [
    ({}, 'new', 'bicubic'), ({'init_from': 'weights'}, 'new', 'bilinear'),
    ({'init_from': 'weights'}, 'begun', 'bicubic'),
    ({'init_from': 'weights', 'data__interpolation': 'nearest'}, 'new', 'nearest')])
def test_resolve_open_interpolation_takes_that_of_the_weights(weights, config, path, expected):
    assert resolve(layouts.config_of(**config), path).data.interpolation == expected


def test_resolve_without_platform_leaves_the_dtype_open(weights):
    assert 'model.dtype' not in open_defaults.resolve(workdir.flat(layouts.config_of(model__dtype='auto')))


def test_resolve_missing_weights_logs_nothing(weights, caplog):
    resolve(layouts.config_of(init_from='gone', data__mean=(0.3,) * 3, data__eval_crop=0.9))
    assert not caplog.records


def test_resolve_explicit_values_keeps_them_and_warns_where_the_weights_differ(weights, caplog):
    config = layouts.config_of(init_from='weights', data__mean=(0.3,) * 3, data__std=(0.2,) * 3, data__eval_crop=0.875)
    resolved = resolve(config)
    assert (resolved.data.mean, resolved.data.std, resolved.data.eval_crop) == ((0.3,) * 3, (0.2,) * 3, 0.875)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert ('data.mean is [0.3, 0.3, 0.3] here, but [0.5, 0.5, 0.5] in the training of the weights in weights: give '
            "--config.data.mean='(0.5, 0.5, 0.5)'") in warnings[0]
    assert 'data.eval_crop is 0.875 here, but 0.9' in warnings[1]


def test_resolve_equal_values_or_a_continued_run_warns_of_nothing(weights, caplog):
    resolve(layouts.config_of(init_from='weights', data__eval_crop=0.9))
    resolve(layouts.config_of(init_from='weights', data__mean=(0.3,) * 3, data__std=(1.0,) * 3), 'begun')
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize('split, recorded, saved', [('auto', 'auto', 'auto'), ('test', 'test[:100%]', 'test[:100%]'),
                                                    ('val', 'val', 'val')])
def test_resolve_explicit_test_split_is_recorded_in_another_form_than_by_older_runs(tmp_path, split, recorded, saved):
    config = resolve(layouts.config_of(data__test_split=split), tmp_path)
    assert config.data.test_split == recorded
    workdir.write_config(tmp_path, {'config': config.to_dict()})
    assert workdir.saved_config(tmp_path)['data.test_split'] == saved


@pytest.mark.parametrize('split, opened', [('test', 'auto'), ('test[:100%]', 'test[:100%]'), ('val', 'val')])
def test_held_out_opens_the_split_that_the_run_was_evaluated_on(monkeypatch, split, opened):
    config = {'config': {'data': {'source': 'folder', 'test_split': split}}}
    monkeypatch.setattr(held_out, 'read_metadata', lambda path: config)
    monkeypatch.setattr(held_out.sources, 'open_source', lambda name, split, **_: split)
    assert held_out.held_out('a', 3) == opened
    assert held_out.held_out('a', 3, config['config']) == split  # the split of a new file


def test_saved_config_test_split_of_an_older_run_means_auto(tmp_path):
    (tmp_path / workdir.CONFIG_FILE).write_text(json.dumps({'data.test_split': 'test'}))
    assert workdir.saved_config(tmp_path)['data.test_split'] == splits.AUTO
