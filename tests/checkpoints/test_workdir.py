"""The config of a resumed run, compared with the config of its first start."""

import json
import pathlib

import numpy as np
import pytest

from evit_jax.checkpoints import continuation, weights
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.checkpoints.loaded import load_model
from evit_jax.checkpoints.manager import read_metadata
from evit_jax.configs import base
from evit_jax.data import sources
from tests.helpers.layouts import config_of

# Config of a run from before most of today's keys existed.
FIRST = pathlib.Path(__file__).parents[1] / 'golden' / 'first_config.json'


@pytest.fixture
def begun(tmp_path):
    """Returns a function that writes a run with a config and a checkpoint to a folder, and returns the folder."""

    def begin(config):
        (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
        workdirs.write_config(tmp_path, {'config': config})
        return tmp_path

    return begin


def continue_run(workdir, config, accept_changes=False):
    """Opens the workdir for a training with the config, and returns the config that is then saved."""
    continuation.open_workdir(workdir, config.to_dict(), accept_changes=accept_changes)
    return json.loads((workdir / 'config.json').read_text())


def test_open_workdir_of_an_older_run_adds_new_keys_at_their_defaults(begun):
    """If this fails for a new key, add its default (what runs did without it) to `continuation._ADDED_KEYS`."""
    before = json.loads(FIRST.read_text())
    after = continue_run(begun(before), base.get_config())
    run = {key: before[key] for key in ('model.dtype', 'data.mean', 'data.std')} | {'data.interpolation': 'bicubic'}
    assert after == workdirs.flat(base.get_config().to_dict()) | run
    assert len(after) > len(before) + 20 and after['reducer.name'] == 'evit'


def test_open_workdir_of_weights_alone_is_refused_with_the_way_out(begun):
    workdir = begun({'model': base.get_config().model.to_dict()})
    with pytest.raises(ValueError, match=r'holds weights alone, .*another --workdir, and --config.init_from=\S+'):
        continue_run(workdir, base.get_config(), accept_changes=True)


def test_workdir_of_version_0_1_is_refused_in_one_line(begun):
    config = base.get_config().to_dict()
    config['model']['lowering'] = config['model'].pop('gather_impl')
    workdir = begun(config)
    message = 'was written by evit_jax 0.1, which this version does not read .*train again in another --workdir'
    for read in (lambda: continue_run(workdir, base.get_config(), accept_changes=True),
                 lambda: workdirs.trained_config(workdir)):
        with pytest.raises(ValueError, match=f'{workdir} {message}') as refusal:
            read()
        assert '\n' not in str(refusal.value)


def test_weights_of_version_0_1_are_refused_by_load_model_and_read_metadata(tmp_path):
    weights.save(tmp_path, {'bias': np.ones(3, np.float32)}, {'config': {'model': {'lowering': 'auto'}}})
    for read in (load_model, read_metadata):
        with pytest.raises(ValueError, match=f'{tmp_path} was written by evit_jax 0.1'):
            read(tmp_path)


@pytest.mark.parametrize(('key', 'value', 'change'), [
    ('reducer.name', 'tome', 'reducer.name evit -> tome'), ('distill.kind', 'hard', 'distill.kind none -> hard'),
    ('optimizer.b2', 0.95, 'optimizer.b2 0.999 -> 0.95'), ('keep.macs', 0.5, 'keep.macs 0.0 -> 0.5')])
def test_open_workdir_with_another_value_than_the_default_is_refused_unless_accepted(begun, key, value, change):
    workdir, config = begun(json.loads(FIRST.read_text())), base.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf'with another config \({change}\): .*--accept_changes'):
        continue_run(workdir, config)
    assert key not in json.loads((workdir / 'config.json').read_text())
    assert continue_run(workdir, config, accept_changes=True)[key] == value


@pytest.mark.parametrize('saved, names', [('e\u0301te', '\xe9te'), ('a\nb', r'a\nb'), ('caf\udce9', r'caf\xe9')])
def test_check_classes_compares_names_as_displayed(saved, names):
    workdirs.check_classes('run', {'class_names': ['ape', saved]}, ['ape', names])
    with pytest.raises(ValueError, match=r'run on other classes \(2 there, 2 in the data; the first that'):
        workdirs.check_classes('run', {'class_names': ['ape', saved]}, [names, 'ape'])


def test_check_classes_names_missing_classes_and_the_way_out(tmp_path):
    for folder in ('val/ape', 'val/cat'):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / 'a.png').write_text('')

    def check():
        sources.check_classes('folder', tmp_path, lambda names: workdirs.check_classes(
            'run', {'class_names': ['ape', 'bat', 'cat']}, names))

    with pytest.raises(ValueError, match='the data lack bat: to evaluate on val/ without them, make train/ next to it'):
        check()
    for name in ('ape', 'bat', 'cat'):
        (tmp_path / 'train' / name).mkdir(parents=True)  # the error message suggests this
    check()
    assert sources.open_source('folder', 'auto', path=tmp_path, num_classes=3).labels.tolist() == [0, 2]


@pytest.mark.parametrize('changes', [
    {'log__every': 9, 'data__workers': 1}, {'checkpoint__minutes': 2.0}, {'sharding': 'fsdp'}])
def test_open_workdir_with_a_change_that_cannot_alter_the_result_is_accepted(begun, changes):
    after = continue_run(begun(config_of().to_dict()), config_of(**changes))
    assert {key.replace('.', '__'): after[key] for key in after}.items() >= changes.items()
