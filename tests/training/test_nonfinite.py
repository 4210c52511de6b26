"""A step whose loss is not finite ends the run or is passed over; its examples are named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evit_jax.checkpoints.manager import newest_step, read_newest
from evit_jax.data import order
from evit_jax.data.transforms import mixing
from evit_jax.training import loop, nonfinite
from tests.helpers import layouts

POISON = 3  # the example that spoils its batches


@pytest.fixture(autouse=True)
def least(monkeypatch):
    layouts.prepare(monkeypatch)


def poison(monkeypatch):
    """Makes every batch with an image as bright as the poisoned one a batch of NaN; and that image bright."""
    mix, read = mixing.mix_batch, layouts.Colours.__getitem__

    def mixed(images, labels, key, **how):
        images, targets = mix(images, labels, key, **how)
        return jnp.where(images.max() > 1.9, jnp.nan, images), targets

    def example(self, index):
        found = read(self, index)
        return found | {'image': np.full_like(found['image'], 255)} if index == POISON else found

    monkeypatch.setattr(mixing, 'mix_batch', mixed)
    monkeypatch.setattr(layouts.Colours, '__getitem__', example)


def config_of(**changes):
    return layouts.config_of(mixing__erase=0.0, data__colour_jitter=0.0, data__mean=(0.5,) * 3, data__std=(0.25,) * 3,
                             **changes)


def spoiled():
    """The steps that show the poisoned example."""
    return [step for step in range(layouts.STEPS) if str(POISON) in order.batch_ids(
        layouts.Colours('train'), step, batch_size=64, seed=0)]


def test_the_steps_are_skipped_counted_and_their_examples_named(tmp_path, monkeypatch, caplog):
    poison(monkeypatch)
    caplog.set_level('INFO')
    metrics = loop.train(config_of(nonfinite='skip'), tmp_path)
    assert len(spoiled()) == 5 and np.isfinite(metrics['loss'])
    files = sorted(int(file.stem) for file in (tmp_path / 'nonfinite').iterdir())
    assert files == spoiled()
    said = json.loads((tmp_path / 'nonfinite' / f'{files[0]}.json').read_text())
    assert str(POISON) in said['examples'] and len(said['examples']) == 64 and said['loss'] == 'nan'
    assert f'step {files[-1]}: loss nan' in caplog.text and 'skipped, 5 so far' in caplog.text
    params, _ = read_newest(tmp_path, 'params')
    assert all(np.isfinite(value).all() for value in params.values())


def test_a_skipped_step_changes_nothing_but_the_count_of_steps(monkeypatch):
    poison(monkeypatch)
    run = loop.experiment.setup(config_of(nonfinite='skip'))
    state, step = run.new_state(), run.train_step()
    before = jax.tree.map(np.asarray, state)
    good = {'image': np.zeros((64, 16, 16, 3), np.uint8), 'label': np.zeros(64, np.int32)}
    state, metrics = step(state, good | {'image': np.full((64, 16, 16, 3), 255, np.uint8)}, run.plan)
    assert np.isnan(metrics['loss']) and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(step=np.int32(0)), before)
    state, metrics = step(state, good, run.plan)
    assert np.isfinite(metrics['loss']) and int(state.step) == 2
    assert (np.asarray(state.params['head']['bias']) != before.params['head']['bias']).any()


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch)
    monkeypatch.setattr(nonfinite, '_MOST_IN_A_ROW', 0)
    with pytest.raises(FloatingPointError, match=r'0 steps before it were skipped; there is no checkpoint yet'):
        loop.train(config_of(nonfinite='skip'), tmp_path)


@pytest.mark.slow
def test_a_run_that_stopped_there_goes_on_with_skip(tmp_path, monkeypatch):
    poison(monkeypatch)
    with pytest.raises(FloatingPointError, match=rf'step {spoiled()[0]}: .*--config.nonfinite=skip'):
        loop.train(config_of(checkpoint__every=1), tmp_path)
    assert newest_step(tmp_path) == (spoiled()[0] or None)
    loop.train(config_of(nonfinite='skip'), tmp_path)
    assert newest_step(tmp_path) == layouts.STEPS


def test_examples_that_cannot_be_read_are_called_by_their_number(monkeypatch):
    monkeypatch.setattr(layouts.Colours, 'broken', True)
    ids = order.batch_ids(layouts.Colours('train'), 0, batch_size=128, seed=0)
    assert {'example 4, unreadable', '5'} <= {*ids} and len(ids) == 128
    repeated = order.batch_ids(layouts.Colours('train'), 0, batch_size=120, seed=0, repeats=3)
    assert len(repeated) == 40
