"""Makes label maps with a trained model: the classes that it predicts for each patch of the whole image.

LV-ViT predicts them with its token head. In other models, the head of the class token is applied to each patch token
after the last norm. The reference does this for its annotators (`TokenLabelHead` of generate_label.py). No token is
dropped.

A departure: the image is resized to the input of the model without preserving the aspect ratio, so that the map covers
all of it. The reference crops the central square and uses its map for the whole image.
"""

import collections
import concurrent.futures
import functools
import hashlib
import math
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.label_maps import Entry, LabelMap
from evit_jax.data.transforms.decode import decode
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.inference.compiled import ReplicatedParams
from evit_jax.models.config import size_text
from evit_jax.reduction.plan import make_plan
from evit_jax.training import step as steps

TOP = 5
_AHEAD = 2  # number of batches to read while another one is computed


class Annotator:
    """Makes label maps with a trained model.

    Attributes:
      top: number of classes in each cell.
      grid: rows and columns of cells of a map; equal to those of patches of the image.

    Args:
      trained: the model.
      batch_size: size of all batches; the last one is padded.
    """

    def __init__(self, trained: LoadedModel, *, batch_size: int):
        config = trained.config
        trained.check_has_classes()
        self.top, self.grid = min(TOP, config.classes), config.grid(trained.image_size)
        self._trained, self._batch_size = trained, batch_size
        self._transform = EvalTransform(trained.image_size, crop=None)
        self._replicated = ReplicatedParams(trained.params, batch_size)
        self._step = self._replicated.jit(_make_step(trained, self.top))

    def __str__(self) -> str:
        """Identifies the annotator by its model and weights, independent of its path."""
        digest = hashlib.blake2b(digest_size=6)
        for leaf in jax.tree.leaves(self._trained.params):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        size = size_text(self._trained.image_size)
        return f'{self._trained.name} at {size} pixels, step {self._trained.step}, weights {digest.hexdigest()}'

    def entries(self, source: Source, start: int, check: Callable[[], None]) -> Iterator[Entry]:
        """Yields the entries of a source's examples in order, beginning with example `start`.

        Args:
          check: function that is called before each batch; it may raise an exception to stop.
        """
        for batch in self._read(source, start):
            check()
            images = [image for _, image in batch if isinstance(image, np.ndarray)]
            label_maps = self._compute(images) if images else iter(())
            for name, image in batch:
                yield Entry(name, next(label_maps)) if isinstance(image, np.ndarray) else Entry(name, None, str(image))

    def _read(self, source, start):
        """Yields batches of (id, image or error). Examples are read sequentially and decoded by threads."""
        pool, waiting = concurrent.futures.ThreadPoolExecutor(os.cpu_count()), collections.deque()
        try:
            for first in range(start, len(source), self._batch_size):
                numbers = range(first, min(first + self._batch_size, len(source)))
                waiting.append([pool.submit(self._decoded, *_example(source, number)) for number in numbers])
                if len(waiting) > _AHEAD:
                    yield [task.result() for task in waiting.popleft()]
            while waiting:
                yield [task.result() for task in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _decoded(self, name, image):
        try:
            return name, image if isinstance(image, Exception) else self._transform(decode(image))
        except (OSError, ValueError) as error:
            return name, error

    def _compute(self, images):
        batch = np.zeros((self._batch_size, *images[0].shape), np.uint8)
        batch[:len(images)] = images
        value, index = map(np.asarray, self._step(self._replicated.params, self._replicated.put(batch)))
        shape = (-1, *self.grid, self.top)
        value, index = (array.reshape(shape).transpose(0, 3, 1, 2) for array in (value, index))
        return map(LabelMap, value[:len(images)], index[:len(images)])


def _example(source, number):
    """Returns the id and the encoded image of an example. If it is unreadable, returns a name and the error."""
    try:
        example = source[number]
        return example['id'], example['image']
    except (OSError, ValueError) as error:
        return f'example {number}', error


def _make_step(trained: LoadedModel, top: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    config = trained.config
    model = models.create(config, dtype=jnp.dtype(trained.dtype), modules=trained.modules)
    prepare = functools.partial(steps.normalise, mean=trained.mean, std=trained.std)
    dense = make_plan(config.patches(trained.image_size), config.depth, rate=1.0, reduce_at=())

    def step(params, images):
        _, intermediates = model.apply(params, prepare(images), dense, patch_tokens=True)
        if 'token_logits' in intermediates:
            return top_logits(intermediates['token_logits'], top)
        head = params['head']
        return top_logits(intermediates['patch_tokens'] @ head['kernel'] + head['bias'], top)

    return step


def top_logits(logits: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """Returns the largest logits, best first, and their classes.

    Returned logits are relative to the level of the remaining classes, which is the log of the mean of their
    exponentials. If these classes get logit 0, a softmax then gives the original probabilities. If no class remains,
    the level of all classes is used.

    Args:
      logits: [..., L].
      top: number of classes to return.

    Returns:
      Logits float32 [..., top], and classes int32 [..., top].
    """
    value, index = jax.lax.top_k(logits, top)
    others = jnp.put_along_axis(logits, index, -jnp.inf, axis=-1, inplace=False) if top < logits.shape[-1] else logits
    count = logits.shape[-1] - top or top
    return value - (jax.nn.logsumexp(others, axis=-1, keepdims=True) - math.log(count)), index
