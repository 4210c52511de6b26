"""The record of a run in its workdir: other data or another teacher at the next start are refused, or accepted."""

import json
import logging

import pytest

from evit_jax.checkpoints import continuation
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.training import history, loop
from evit_jax.training.history import Record
from tests.helpers import layouts

least = layouts.least
SPLIT = {'examples': 401, 'split': 'train', 'fingerprint': 'a'}
RECORD = Record(SPLIT, SPLIT | {'examples': 100, 'split': 'val'}, {}, {'jax': '0.10.2'}, 8, True)


@pytest.fixture
def begun(tmp_path):
    """A workdir with a checkpoint, of a run that was recorded at its start."""
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    workdirs.write_config(tmp_path, {'config': layouts.config_of().to_dict()})
    history.compare(tmp_path, RECORD, accept_changes=False)
    return tmp_path


def saved(workdir):
    return json.loads((workdir / 'config.json').read_text())


def test_compare_with_the_same_data_changes_nothing(begun, caplog):
    before = saved(begun)
    history.compare(begun, RECORD, accept_changes=False)
    assert saved(begun) == before and before['recorded']['train'] == SPLIT
    assert before['segments'] == [{'step': 0, 'samples': 0, 'batch_size': 64, 'repeats': 1, 'examples': 401}]


@pytest.mark.parametrize(('changes', 'said'), [
    ({'train': SPLIT | {'examples': 601, 'fingerprint': 'b'}}, 'train: 401 examples then, 601 now'),
    ({'test': SPLIT | {'examples': 100, 'split': 'test', 'fingerprint': 'c'}},
     "test: split 'val' then, 'test' now"),
    ({'train': SPLIT | {'fingerprint': 'b'}}, 'train: 401 examples as before, but other ones or in another order'),
    ({'learned': {'weights of the teacher': 'd'}}, 'weights of the teacher: none then, d now')])
def test_compare_with_other_data_refuses_by_name_or_goes_on_with_a_warning(begun, caplog, changes, said):
    now, before = RECORD._replace(**changes), saved(begun)
    with pytest.raises(ValueError, match=r'holds a run with (other|another) .*--accept_changes') as error:
        history.compare(begun, now, accept_changes=False)
    assert said in str(error.value) and saved(begun) == before
    history.compare(begun, now, accept_changes=True)
    assert 'going on with ' in caplog.text and f'({said})' in caplog.text
    assert ('WORKDIR/best' in caplog.text) == ('test' in changes)
    assert saved(begun) == before | {'recorded': json.loads(json.dumps(now._asdict()))}
    history.compare(begun, now, accept_changes=False)


def test_compare_records_a_run_from_before_the_records_with_a_line(begun, caplog):
    caplog.set_level(logging.INFO)
    older = {key: value for key, value in saved(begun).items() if key not in ('recorded', 'segments')}
    workdirs.write_flat(begun, older)
    history.compare(begun, RECORD, accept_changes=False)
    assert 'this run began before data, teacher and versions were recorded' in caplog.text
    assert saved(begun)['recorded']['test']['examples'] == 100


def test_compare_tells_of_other_versions_and_of_other_devices_where_images_are_mixed(begun, caplog):
    caplog.set_level(logging.INFO)
    history.compare(begun, RECORD._replace(versions={'jax': '0.11.0'}, devices=4), accept_changes=False)
    assert 'jax 0.10.2 -> 0.11.0' in caplog.text and '4 devices share a batch, 8 did' in caplog.text
    caplog.clear()
    history.compare(begun, RECORD._replace(versions={'jax': '0.11.0'}, mixes=False), accept_changes=False)
    assert caplog.text == ''


def test_open_workdir_refuses_another_count_of_steps_to_an_update(begun):
    with pytest.raises(ValueError, match=r'optimizer.accumulate 1 -> 2\).*--config.init_from='):
        continuation.open_workdir(begun, layouts.config_of(optimizer__accumulate=2).to_dict(), accept_changes=True)


def test_open_workdir_keeps_the_old_batch_size_of_a_run_from_before_the_records(begun, caplog):
    older = {key: value for key, value in saved(begun).items() if key not in ('recorded', 'segments')}
    workdirs.write_flat(begun, older)
    continuation.open_workdir(begun, layouts.config_of(batch_size=32).to_dict(), accept_changes=True)
    assert 'batch_size 64 -> 32' in caplog.text and saved(begun)['batch_size'] == 32
    history.compare(begun, RECORD, accept_changes=False)
    assert saved(begun)['segments'] == [{'step': 0, 'samples': 0, 'batch_size': 64, 'repeats': 1, 'examples': None}]


def test_a_run_that_goes_on_with_another_batch_size_or_other_data_keeps_its_epoch(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    layouts.train_here(tmp_path / 'first', epochs=5)
    layouts.cut_off(tmp_path / 'first', tmp_path / 'run')  # step 5, epoch 2.5
    with pytest.raises(ValueError, match=r'batch_size 64 -> 32.*from the position in the epoch that it has reached'):
        layouts.train_here(tmp_path / 'run', batch_size=32)
    monkeypatch.setitem(layouts.Colours.sizes, 'train', 192)
    with pytest.raises(ValueError, match='train: 128 examples then, 192 now'):
        layouts.train_here(tmp_path / 'run')
    caplog.clear()
    with pytest.MonkeyPatch.context() as patch:
        layouts.prepare(patch)
        config = layouts.config_of(batch_size=32, log__pictures=0)
        loop.train(config, tmp_path / 'run', accept_changes=True)
    assert 'batch_size 64 -> 32, examples 128 -> 192: at step 5, 2.50 epochs are trained' in caplog.text
    assert 'continuing at step 5 of 20, epoch 2.50 of 5' in caplog.text  # 15 steps of 32: 2.5 epochs of 192
    records = layouts.records(tmp_path / 'run')
    assert records[-1]['step'] == 20 and records[-1]['train/lr'] < 1e-3 < records[0]['train/lr']
    caplog.clear()
    loop.evaluate_workdir(layouts.config_of(log__pictures=0), tmp_path / 'run')
    assert 'not the examples' not in caplog.text
    monkeypatch.setitem(layouts.Colours.sizes, 'test', 90)
    loop.evaluate_workdir(layouts.config_of(log__pictures=0), tmp_path / 'run')
    assert 'not the examples that the run itself was evaluated on: 100 examples then, 90 now' in caplog.text
