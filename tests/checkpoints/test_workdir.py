"""The config of a run that goes on, held against the one that it began with."""

import json
import pathlib

import pytest

from configs import base
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.data import sources
from tests.helpers.layouts import config_of

FIRST = pathlib.Path(__file__).parents[1] / 'golden' / 'first_config.json'  # of a run from before most of today's keys


@pytest.fixture
def begun(tmp_path):
    """Makes the folder hold a run that began with a config."""

    def begin(config):
        (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
        workdirs.write_config(tmp_path, {'config': config})
        return tmp_path

    return begin


def go_on(workdir, config, accept_changes=False):
    """What is in the workdir's config afterwards."""
    workdirs.open_workdir(workdir, config.to_dict(), accept_changes=accept_changes)
    return json.loads((workdir / 'config.json').read_text())


def test_a_run_from_before_a_key_goes_on_at_its_default_and_is_told_of_it(begun):
    """Where this fails for a new key: its default, which is what runs did without it, belongs in the table there."""
    before = json.loads(FIRST.read_text())
    after = go_on(begun(before), base.get_config())
    assert after == workdirs.flat(base.get_config().to_dict()) | {
        key: before[key] for key in ('model.dtype', 'data.mean', 'data.std')}
    assert len(after) > len(before) + 20 and after['reducer.name'] == 'evit'


def test_a_training_in_a_folder_of_weights_alone_is_refused_with_the_way_out(begun):
    workdir = begun({'model': base.get_config().model.to_dict()})
    with pytest.raises(ValueError, match=r'holds weights alone, .*another --workdir, and --config.init_from=\S+'):
        go_on(workdir, base.get_config(), accept_changes=True)


@pytest.mark.parametrize(('key', 'value', 'said'), [
    ('reducer.name', 'tome', 'reducer.name evit -> tome'), ('distill.kind', 'hard', 'distill.kind none -> hard'),
    ('optimizer.b2', 0.95, 'optimizer.b2 0.999 -> 0.95'), ('keep.macs', 0.5, 'keep.macs 0.0 -> 0.5')])
def test_another_value_than_its_default_is_another_config(begun, key, value, said):
    workdir, config = begun(json.loads(FIRST.read_text())), base.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf'with another config \({said}\): .*--accept_changes'):
        go_on(workdir, config)
    assert key not in json.loads((workdir / 'config.json').read_text())
    assert go_on(workdir, config, accept_changes=True)[key] == value


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
    with pytest.raises(ValueError, match='the data lack bat: to evaluate on val/ without them, make train/ beside it'):
        check()
    for name in ('ape', 'bat', 'cat'):
        (tmp_path / 'train' / name).mkdir(parents=True)  # the way out
    check()
    assert sources.open_source('folder', 'auto', path=tmp_path, num_classes=3).labels.tolist() == [0, 2]


@pytest.mark.parametrize('changes', [
    {'log__every': 9, 'data__workers': 1}, {'checkpoint__minutes': 2.0}, {'sharding': 'fsdp'}])
def test_a_change_that_cannot_alter_the_result_is_no_other_config(begun, changes):
    after = go_on(begun(config_of().to_dict()), config_of(**changes))
    assert {key.replace('.', '__'): after[key] for key in after}.items() >= changes.items()
