"""Tests of the position of a run in its data, which survives changes of batch size, repeats and data."""

import collections

import jax
import pytest

from evit_jax.data import order, positions
from evit_jax.data.positions import Segment
from evit_jax.training import optimizer
from tests.helpers import layouts, toys

BEGUN = Segment(0, 0, 4, 1, 24)  # 6 steps per epoch


def now(**changes):
    return BEGUN._replace(**changes)


def test_extend_segments_without_a_change_keeps_one_segment():
    assert positions.extend_segments([BEGUN], 9, now()) == (BEGUN,)
    assert BEGUN.offset == 0 and BEGUN.epoch(9) == 1.5


@pytest.mark.parametrize('batch_size', [2, 3, 8, 24])
def test_extend_segments_other_batch_size_trains_each_example_of_an_epoch_once(batch_size):
    stopped, epochs = 9, 3
    segment = positions.extend_segments([BEGUN], stopped, now(batch_size=batch_size))[-1]
    source = toys.Numbered(24)
    before = toys.labels(toys.train(source, batch_size=4, epochs=epochs)[:stopped])
    after = toys.labels(toys.train(source, start_step=stopped, batch_size=batch_size, epochs=epochs,
                                   offset=segment.offset))
    shown = before + after
    assert 72 - len(shown) < batch_size
    whole = toys.labels(toys.train(source, batch_size=4, epochs=epochs))
    assert shown == whole[:len(shown)]
    assert set(collections.Counter(shown[:24]).values()) == set(collections.Counter(shown[24:48]).values()) == {1}


def test_extend_segments_other_data_or_repeats_keep_the_position_in_the_epoch():
    more = positions.extend_segments([BEGUN], 9, now(examples=48))[-1]
    assert more == Segment(9, 72, 4, 1, 48) and more.epoch(9) == BEGUN.epoch(9) == 1.5
    before = now(examples=600, batch_size=100)
    repeated = positions.extend_segments([before], 9, before._replace(repeats=3))[-1]
    assert repeated.epoch_samples == 512 and repeated.epoch(9) == pytest.approx(1.5)


def test_extend_segments_after_lost_checkpoints_drops_later_segments():
    changed = positions.extend_segments([BEGUN], 9, now(batch_size=8))
    assert positions.extend_segments(changed, 12, now(batch_size=8)) == changed
    assert positions.extend_segments(changed, 9, now(batch_size=8)) == changed
    assert positions.extend_segments(changed, 6, now(batch_size=8)) == (BEGUN, Segment(6, 24, 8, 1, 24))
    assert positions.extend_segments(changed, 9, now()) == (BEGUN,)
    third = positions.extend_segments(changed, 12, now())
    assert third[:2] == changed and third[2].epoch(12) == changed[1].epoch(12) == 2.5


def test_extend_segments_without_recorded_examples_uses_the_current_number():
    assert positions.extend_segments([now(examples=None)], 9, now()) == (BEGUN,)
    assert positions.extend_segments([now(examples=None)], 9, now(batch_size=8))[-1].samples == 36


def test_describe_change_contains_epochs_before_and_after():
    segment = positions.extend_segments([BEGUN], 9, now(batch_size=8))[-1]
    assert positions.describe_change(BEGUN, segment, 9, 3) == (
        'batch_size 4 -> 8: at step 9, 1.50 epochs are trained. The run resumes at epoch 1.50 of 3 (by the number of '
        'steps it would be 3.00) and trains 4 more steps; learning rate and keep rate are those of that epoch')


def test_batch_ids_with_an_offset_equal_those_of_the_batch():
    segment = positions.extend_segments([BEGUN], 9, now(batch_size=8))[-1]
    batch = toys.train(toys.Numbered(24), start_step=9, batch_size=8, offset=segment.offset)[0]
    assert order.batch_ids(toys.Numbered(24), 9, batch_size=8, seed=7, offset=segment.offset) == [
        f'number {label}' for label in batch['label'].tolist()]


def test_learning_rate_with_an_offset_is_the_same_curve():
    how = {'lr': 1.0, 'batch_size': 512, 'total_steps': 100, 'warmup_steps': 10, 'warmup_lr': 0.0, 'min_lr': 0.0}
    curve, shifted = optimizer.learning_rate(**how), optimizer.learning_rate(**how, begun_at=-30.0)
    for step in (30, 35, 60, 130):
        assert float(shifted(step)) == pytest.approx(float(curve(step - 30)))


def test_experiment_with_an_offset_has_steps_stages_and_learning_rate_of_its_epoch():
    schedule = {'keep__start_epoch': 1, 'keep__shrink_epochs': 2, 'keep__levels': 3}
    run = layouts.setup(batch_size=32, **schedule)  # 4 steps per epoch, 20 in total
    shifted = run.with_offset(5 * 64 - 5 * 32)  # 5 steps with 64 images
    assert (run.total_steps, shifted.total_steps) == (20, 15)
    assert shifted.epoch(5) == run.epoch(10) == 2.5
    assert [stage.start for stage in run.stages] == [0, 9, 12]
    assert [stage.start for stage in shifted.stages] == [0, 4, 7]
    assert float(shifted.schedule(5)) == pytest.approx(float(run.schedule(10)))
    assert run.with_offset(0) is run


@pytest.mark.parametrize('from_epoch', [0.0, 2.5])
def test_experiment_with_an_offset_has_the_same_optimizer_state(from_epoch):
    run = layouts.setup(optimizer__backbone_from_epoch=from_epoch, batch_size=32)
    shifted = run.with_offset(5 * 64 - 5 * 32)
    assert jax.tree.structure(shifted.abstract_state()) == jax.tree.structure(run.abstract_state())
