"""The stream of predictions: order, batches and unreadable images."""

import numpy as np

from evit_jax.inference import streaming
from evit_jax.inference.prediction import OUTPUTS
from evit_jax.reduction.plan import make_plan


def test_stream_computes_padded_batches_and_yields_the_images_in_order(tmp_path):
    batches = []

    def run(batch):
        batches.append(batch[:, 0, 0, 0].tolist())
        return {'logits': batch[:, 0, 0].astype(np.float32)} | dict.fromkeys(OUTPUTS, ())

    images = [np.full((2, 2, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
    images.insert(2, tmp_path / 'missing.png')
    results = list(streaming.stream(run, images, make_plan(4, 1, reduce_at=()), 'abc', transform=np.asarray,
                                    batch_size=2, top=1))
    assert [bool(result.problem) for result in results] == [False, False, True, False, False, False]
    assert [result.logits[0] for result in results if not result.problem] == [1, 2, 3, 4, 5]
    assert batches == [[1, 2], [3, 4], [5, 0]]
