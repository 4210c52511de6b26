"""The record of a run in its workdir: changes of data or teacher at the next start are refused, or accepted."""

import json
import logging

import pytest

from evit_jax.checkpoints import continuation
from evit_jax.checkpoints import workdir as workdirs
from evit_jax.training import history
from evit_jax.training.history import Record
from tests.helpers import layouts

SPLIT = {'examples': 401, 'split': 'train', 'fingerprint': 'a'}
RECORD = Record(SPLIT, SPLIT | {'examples': 100, 'split': 'val'}, {}, {'jax': '0.10.2'}, 8, True)


@pytest.fixture
def recorded(tmp_path):
    """A workdir with a checkpoint and a record."""
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
    workdirs.write_config(tmp_path, {'config': layouts.config_of().to_dict()})
    history.compare(tmp_path, RECORD, accept_changes=False)
    return tmp_path


def saved(workdir):
    return json.loads((workdir / 'config.json').read_text())


def test_compare_with_the_same_data_changes_nothing(recorded, caplog):
    before = saved(recorded)
    history.compare(recorded, RECORD, accept_changes=False)
    assert saved(recorded) == before and before['recorded']['train'] == SPLIT
    assert before['segments'] == [{'step': 0, 'samples': 0, 'batch_size': 64, 'repeats': 1, 'examples': 401}]


@pytest.mark.parametrize(('changes', 'message'), [
    ({'train': SPLIT | {'examples': 601, 'fingerprint': 'b'}}, 'train: 401 examples then, 601 now'),
    ({'test': SPLIT | {'examples': 100, 'split': 'test', 'fingerprint': 'c'}},
     "test: split 'val' then, 'test' now"),
    ({'train': SPLIT | {'fingerprint': 'b'}}, 'train: 401 examples as before, but other ones or in another order'),
    ({'learned': {'weights of the teacher': 'd'}}, 'weights of the teacher: none then, d now')])
def test_compare_with_other_data_is_refused_or_accepted_with_a_warning(recorded, caplog, changes, message):
    now, before = RECORD._replace(**changes), saved(recorded)
    with pytest.raises(ValueError, match=r'holds a run with (other|another) .*--accept_changes') as error:
        history.compare(recorded, now, accept_changes=False)
    assert message in str(error.value) and saved(recorded) == before
    history.compare(recorded, now, accept_changes=True)
    assert 'continuing with ' in caplog.text and f'({message})' in caplog.text
    assert ('WORKDIR/best' in caplog.text) == ('test' in changes)
    assert saved(recorded) == before | {'recorded': json.loads(json.dumps(now._asdict()))}
    history.compare(recorded, now, accept_changes=False)


def test_compare_without_a_record_logs_it_and_records_now(recorded, caplog):
    caplog.set_level(logging.INFO)
    older = {key: value for key, value in saved(recorded).items() if key not in ('recorded', 'segments')}
    workdirs.write_flat(recorded, older)
    history.compare(recorded, RECORD, accept_changes=False)
    assert 'the workdir has no record of data, teacher and versions' in caplog.text
    assert saved(recorded)['recorded']['test']['examples'] == 100


def test_compare_logs_other_versions_and_with_mixing_other_devices(recorded, caplog):
    caplog.set_level(logging.INFO)
    history.compare(recorded, RECORD._replace(versions={'jax': '0.11.0'}, devices=4), accept_changes=False)
    assert 'jax 0.10.2 -> 0.11.0' in caplog.text and '4 devices share a batch, 8 did' in caplog.text
    caplog.clear()
    history.compare(recorded, RECORD._replace(versions={'jax': '0.11.0'}, mixes=False), accept_changes=False)
    assert caplog.text == ''


def test_open_workdir_with_another_accumulate_is_refused(recorded):
    with pytest.raises(ValueError, match=r'optimizer.accumulate 1 -> 2\).*--config.init_from='):
        continuation.open_workdir(recorded, layouts.config_of(optimizer__accumulate=2).to_dict(), accept_changes=True)


def test_open_workdir_without_a_record_keeps_the_old_batch_size_as_a_segment(recorded, caplog):
    older = {key: value for key, value in saved(recorded).items() if key not in ('recorded', 'segments')}
    workdirs.write_flat(recorded, older)
    continuation.open_workdir(recorded, layouts.config_of(batch_size=32).to_dict(), accept_changes=True)
    assert 'batch_size 64 -> 32' in caplog.text and saved(recorded)['batch_size'] == 32
    history.compare(recorded, RECORD, accept_changes=False)
    assert saved(recorded)['segments'] == [{'step': 0, 'samples': 0, 'batch_size': 64, 'repeats': 1, 'examples': None}]


def test_train_resumed_with_another_batch_size_or_data_keeps_its_epoch(shared_run, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    layouts.cut_off(shared_run, tmp_path / 'run')  # step 5, epoch 2.5 of 5
    with pytest.raises(ValueError, match=r'batch_size 64 -> 32.*from the position in the epoch that it has reached'):
        layouts.train_here(tmp_path / 'run', batch_size=32)
    monkeypatch.setitem(layouts.Colours.sizes, 'train', 192)
    with pytest.raises(ValueError, match='train: 128 examples then, 192 now'):
        layouts.train_here(tmp_path / 'run')
    caplog.clear()
    layouts.train_here(tmp_path / 'run', accept_changes=True, batch_size=32, log__pictures=0)
    assert 'batch_size 64 -> 32, examples 128 -> 192: at step 5, 2.50 epochs are trained' in caplog.text
    assert 'continuing at step 5 of 20, epoch 2.50 of 5' in caplog.text  # 15 steps of 32: 2.5 epochs of 192
    records = layouts.records(tmp_path / 'run')
    assert records[-1]['step'] == 20 and records[-1]['train/lr'] < 1e-3 < records[0]['train/lr']
    caplog.clear()
    layouts.evaluate_here(tmp_path / 'run', log__pictures=0)
    assert 'not the examples' not in caplog.text
    monkeypatch.setitem(layouts.Colours.sizes, 'test', 90)
    layouts.evaluate_here(tmp_path / 'run', log__pictures=0)
    assert 'not the examples that the run itself was evaluated on: 100 examples then, 90 now' in caplog.text
