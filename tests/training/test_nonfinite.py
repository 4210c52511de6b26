"""Steps whose loss is not finite end the run or are skipped, and their examples are named."""

import json

import jax
import numpy as np
import pytest

from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.data import order
from evit_jax.training import nonfinite
from tests.helpers import layouts, poison


@pytest.fixture
def poisoned(monkeypatch):
    poison.poison(monkeypatch)


def train(workdir, **changes):
    return layouts.train_here(workdir, **poison.settings(**changes))


def test_train_with_skip_counts_the_steps_and_names_their_examples(poisoned, tmp_path, caplog):
    caplog.set_level('INFO')
    metrics = train(tmp_path, nonfinite='skip')
    assert len(poison.poisoned_steps()) == 5 and np.isfinite(metrics['loss'])
    files = sorted(int(file.stem) for file in (tmp_path / 'nonfinite').iterdir())
    assert files == poison.poisoned_steps()
    record = json.loads((tmp_path / 'nonfinite' / f'{files[0]}.json').read_text())
    assert str(poison.EXAMPLE) in record['examples'] and len(record['examples']) == 64 and record['loss'] == 'nan'
    assert f'step {files[-1]}: loss nan' in caplog.text and 'skipped, 5 so far' in caplog.text
    params, _ = read_newest(tmp_path, 'params')
    assert all(np.isfinite(value).all() for value in params.values())


def test_train_step_that_is_skipped_changes_only_the_step_count(poisoned):
    run = layouts.setup(**poison.settings(nonfinite='skip'))
    state, step = run.new_state(), run.train_step()
    before = jax.tree.map(np.asarray, state)
    good = {'image': np.zeros((64, 16, 16, 3), np.uint8), 'label': np.zeros(64, np.int32)}
    state, metrics = step(state, good | {'image': np.full((64, 16, 16, 3), 255, np.uint8)}, run.plan)
    assert np.isnan(metrics['loss']) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=np.int32(0)), before)
    state, metrics = step(state, good, run.plan)
    assert np.isfinite(metrics['loss']) and int(state.step) == 2
    assert (np.asarray(state.params['head']['bias']) != before.params['head']['bias']).any()


def test_train_with_skip_ends_after_too_many_steps_in_a_row(poisoned, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, '_MAX_IN_A_ROW', 0)
    with pytest.raises(FloatingPointError, match=r'0 steps before it were skipped; there is no checkpoint yet'):
        train(tmp_path, nonfinite='skip')


@pytest.mark.slow
def test_train_stopped_at_a_nonfinite_step_resumes_with_skip(poisoned, tmp_path):
    with pytest.raises(FloatingPointError, match=rf'step {poison.poisoned_steps()[0]}: .*--config.nonfinite=skip'):
        train(tmp_path, checkpoint__every=1)
    assert newest_step(tmp_path) == (poison.poisoned_steps()[0] or None)
    train(tmp_path, nonfinite='skip')
    assert newest_step(tmp_path) == layouts.STEPS


def test_batch_ids_of_unreadable_examples_are_their_numbers(monkeypatch):
    monkeypatch.setattr(layouts.Colours, 'broken', True)
    ids = order.batch_ids(layouts.Colours('train'), 0, batch_size=128, seed=0)
    assert {'example 4, unreadable', '5'} <= {*ids} and len(ids) == 128
    repeated = order.batch_ids(layouts.Colours('train'), 0, batch_size=120, seed=0, repeats=3)
    assert len(repeated) == 40
