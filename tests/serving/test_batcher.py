"""The batcher joins images of one plan, pads them to fixed sizes, and survives errors and cancelled requests."""

import threading

import numpy as np
import pytest

from evit_jax.serving.batcher import Batcher, QueueFull, batch_sizes
from evit_jax.serving.engines import Outputs
from tests.helpers import tiny


class Engine:
    """Returns the mean of each image, and records the calls. It waits until `go` is set."""

    def __init__(self):
        self.calls, self.go, self.started = [], threading.Event(), threading.Event()
        self.go.set()

    def __call__(self, plan, images):
        self.started.set()
        assert self.go.wait(20)
        self.calls.append((plan, len(images)))
        if plan == 'broken':
            raise ValueError('this plan is broken')
        return Outputs(images.mean(axis=(1, 2, 3), dtype=np.float32)[:, None])


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def blocked(engine):
    """A batcher of at most 4 images whose engine is busy with one image until `engine.go` is set."""
    engine.go.clear()
    batcher = Batcher(engine, max_batch=4, max_wait=0.0, max_queue=6)
    first, = batcher.submit('a', tiny.images(1, seed=9))
    assert engine.started.wait(20)
    yield batcher
    engine.go.set()
    batcher.close()
    assert first.result().batch_size == 1


@pytest.mark.parametrize('max_batch, sizes', [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_batch_sizes_are_powers_of_two_and_the_largest(max_batch, sizes):
    assert batch_sizes(max_batch) == sizes


def test_batcher_joins_waiting_images_of_a_plan_and_pads_them(engine, blocked):
    images = tiny.images(4)
    futures = [future for image in images[:3] for future in blocked.submit('a', [image])]
    futures += blocked.submit('b', images[3:])
    engine.go.set()
    answers = [future.result(20) for future in futures]
    assert engine.calls == [('a', 1), ('a', 4), ('b', 1)]
    assert [answer.batch_size for answer in answers] == [3, 3, 3, 1]
    for image, answer in zip(images, answers):
        assert answer.outputs.logits == image.mean(dtype=np.float32)


def test_batcher_beyond_its_queue_refuses_all_images_of_a_request(blocked):
    blocked.submit('a', tiny.images(5))
    with pytest.raises(QueueFull):
        blocked.submit('a', tiny.images(2))
    assert blocked.num_waiting == 5


def test_batcher_waits_for_other_images_until_max_wait(engine):
    batcher = Batcher(engine, max_batch=2, max_wait=30.0, max_queue=6)
    first, = batcher.submit('a', tiny.images(1))
    assert not engine.started.wait(0.05)
    batcher.submit('a', tiny.images(1))
    assert first.result(20).batch_size == 2
    batcher.close()


def test_batcher_skips_a_cancelled_image(engine, blocked):
    cancelled, other = blocked.submit('a', tiny.images(2))
    assert cancelled.cancel()
    engine.go.set()
    assert other.result(20).batch_size == 1


def test_batcher_error_of_the_engine_ends_only_its_batch(engine, blocked):
    broken, = blocked.submit('broken', tiny.images(1))
    other, = blocked.submit('a', tiny.images(1))
    engine.go.set()
    with pytest.raises(ValueError, match='this plan is broken'):
        broken.result(20)
    assert other.result(20).batch_size == 1


def test_batcher_close_computes_what_waits_and_refuses_more(engine):
    batcher = Batcher(engine, max_batch=2, max_wait=30.0, max_queue=6)
    waiting, = batcher.submit('a', tiny.images(1))
    batcher.close()
    assert waiting.result(0).batch_size == 1
    with pytest.raises(QueueFull):
        batcher.submit('a', tiny.images(1))
