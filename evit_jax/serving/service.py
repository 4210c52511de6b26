"""Predicts the images of requests with a served model: compiles its programs, batches images, formats the results."""

import asyncio
import concurrent.futures
import os
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from evit_jax.inference.prediction import NOT_FINITE, best_guesses
from evit_jax.serving.batcher import Batcher, QueueFull
from evit_jax.serving.engines import Engine, Outputs
from evit_jax.serving.metrics import Metrics
from evit_jax.serving.served_model import ServedModel
from evit_jax.serving.uploads import Limits, busy
from evit_jax.viz.templates import jpeg_url

_JPEG_QUALITY = 92  # quality of the images that are returned


class ResultOptions(NamedTuple):
    """The requested parts of a result."""

    top: int = 5         # number of classes
    kept: bool = False   # kept patches and class attention of each reduction
    image: bool = False  # the input of the model, as the URL of a JPEG


class Service:
    """A served model with its batcher.

    Args:
      served: the description of the model.
      engine: computes its plans.
      limits: limits of the server.
    """

    def __init__(self, served: ServedModel, engine: Engine, limits: Limits):
        self.served, self.limits, self.metrics = served, limits, Metrics()
        self.is_ready = False
        self.executor = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), 'images')  # decodes images
        self._engine, self._stopping = engine, threading.Event()
        self.batcher = Batcher(engine, max_batch=limits.max_batch, max_wait=limits.max_wait,
                               max_queue=limits.max_queue, observe=self.metrics.observe_batch)
        self.metrics.watch('evit_queue_images', 'Images that wait for a batch', lambda: self.batcher.num_waiting)
        self.metrics.watch('evit_ready', '1 if all programs are compiled', lambda: self.is_ready)

    def warm_up(self) -> None:
        """Compiles the program of each plan and batch size by running it. Then the service is ready."""
        begin, plans, sizes = time.monotonic(), self.served.plans, self.batcher.sizes
        for plan in plans:
            for size in sizes:
                if self._stopping.is_set():
                    return
                self._engine(plan, np.zeros((size, *self.served.image_size, 3), np.uint8))
        self.is_ready = True
        logging.info('%d programs are compiled: plans %s, batches of %s; %.1f s', len(plans) * len(sizes),
                     ', '.join(plans), ', '.join(map(str, sizes)), time.monotonic() - begin)

    def close(self) -> None:
        """Computes the waiting images, and ends the threads."""
        self._stopping.set()
        self.batcher.close()
        self.executor.shutdown()

    async def predict(self, plan: str, names: Sequence[str], images: Sequence[np.ndarray],
                      options: ResultOptions) -> list[dict[str, Any]]:
        """Returns the result of each image.

        Raises:
          HTTPException: the queue is full, or the service is not ready.
        """
        if not self.is_ready:
            raise busy('the programs are being compiled')
        try:
            futures = self.batcher.submit(plan, images)
        except QueueFull:
            raise busy(f'{self.batcher.num_waiting} images are waiting, at most {self.limits.max_queue} may') from None
        answers = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return [self._result(plan, name, image, answer, options) for name, image, answer in zip(names, images, answers)]

    def _result(self, plan, name, image, answer, options):
        outputs, result = answer.outputs, {'name': name}
        if not np.isfinite(outputs.logits).all():
            return result | {'problem': NOT_FINITE}
        if self.served.class_names:
            guesses = best_guesses(outputs.logits, self.served.class_names, options.top)
            result['top'] = [guess._asdict() for guess in guesses]
        else:
            result['features'] = outputs.logits.tolist()
        if options.kept:
            result['reductions'] = reductions(outputs, self.served.plans[plan]['reductions'])
        if options.image:
            result['image'] = jpeg_url(image, _JPEG_QUALITY)
        return result | {'batch': answer.batch_size, 'batch_ms': round(1e3 * answer.seconds, 3)}


def reductions(outputs: Outputs, blocks: Sequence[int]) -> list[dict[str, Any]]:
    """Returns for each reduction its block, the kept patches, the token of each patch, and the attention if it has one.

    Args:
      outputs: the outputs of one image.
      blocks: the blocks that reduce.
    """
    entries = []
    for stage, kept in enumerate(outputs.kept):
        entry = {'block': blocks[stage], 'kept': kept.tolist(),
                 'token_of_patch': outputs.token_of_patch[stage].tolist()}
        if outputs.class_attention:
            entry['attention'] = _attention_by_patch(outputs, stage)
        entries.append(entry)
    return entries


def _attention_by_patch(outputs, stage):
    """Returns the class attention to the token that holds each patch before a reduction; None for a patch that was
    dropped or fused before."""
    attention = outputs.class_attention[stage]
    if stage == 0:
        return _rounded(attention)
    index, kept = outputs.token_of_patch[stage - 1], outputs.kept[stage - 1]
    hidden = (index < 0) | (kept[index] < 0)
    return [None if absent else value for absent, value in zip(hidden.tolist(), _rounded(attention[index]))]


def _rounded(values):
    return [round(value, 6) for value in values.tolist()]
