"""Label maps by a trained model: which classes it sees at each patch of an image that it is shown whole.

A model with a head for tokens (LV-ViT) is asked by that; of others the head of the class token is put to each patch
token behind the last norm, as the reference does with the annotators that it knows (`TokenLabelHead` of
generate_label.py, to the last feature map of a convolutional one). No token is dropped. The image is squeezed to a
square, so that the map is of all of it; the reference cuts the middle square out, and then takes the map for one of the
whole.
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
from evit_jax.reduction.plan import make_plan
from evit_jax.training import step as steps

TOP = 5
_AHEAD = 2  # batches that are read while one is computed


class Annotator:
    """Makes label maps.

    Attributes:
      top: classes at each place.
      side: places along a side of the map: the patches of the model.

    Args:
      batch_size: of all batches; what is missing in the last one is filled up.
    """

    def __init__(self, trained: LoadedModel, *, batch_size: int):
        config = trained.config
        self.top, self.side = min(TOP, config.classes), math.isqrt(config.patches(trained.image_size))
        self._trained, self._batch_size = trained, batch_size
        self._transform = EvalTransform(trained.image_size, crop=None)
        self._replicated = ReplicatedParams(trained.params, batch_size)
        self._step = self._replicated.jit(_make_step(trained, self.top))

    def __str__(self) -> str:
        """Says which annotator this is, by what it does and not where it lies."""
        digest = hashlib.blake2b(digest_size=6)
        for leaf in jax.tree.leaves(self._trained.params):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return (f'{self._trained.name} at {self._trained.image_size} pixels, step {self._trained.step}, weights '
                f'{digest.hexdigest()}')

    def entries(self, source: Source, start: int, check: Callable[[], None]) -> Iterator[Entry]:
        """The maps of a source's examples from one on, in order.

        Args:
          check: called before each batch; what it raises ends the work.
        """
        for batch in self._read(source, start):
            check()
            images = [image for _, image in batch if isinstance(image, np.ndarray)]
            made = self._compute(images) if images else iter(())
            for name, image in batch:
                yield Entry(name, next(made)) if isinstance(image, np.ndarray) else Entry(name, None, str(image))

    def _read(self, source, start):
        """Batches of name and image, or the error that it is; examples are read in turn, and decoded by threads."""
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
        square = (-1, self.side, self.side, self.top)
        value, index = (of.reshape(square).transpose(0, 3, 1, 2) for of in (value, index))
        return map(LabelMap, value[:len(images)], index[:len(images)])


def _example(source, number):
    """Name and encoded image of an example, or the error that it is."""
    try:
        example = source[number]
        return example['id'], example['image']
    except (OSError, ValueError) as error:
        return f'example {number}', error


def _make_step(trained: LoadedModel, top: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    config = trained.config
    model = models.create(config, dtype=jnp.dtype(trained.dtype))
    prepare = functools.partial(steps.normalise, mean=trained.mean, std=trained.std)
    dense = make_plan(config.patches(trained.image_size), config.depth, rate=1.0, reduce_at=())

    def step(params, images):
        _, seen = model.apply(params, prepare(images), dense)
        if 'token_logits' in seen:
            return likeliest(seen['token_logits'], top)
        head = params['head']
        return likeliest(seen['norm'][:, config.prefix:] @ head['kernel'] + head['bias'], top)

    return step


def likeliest(logits: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """The largest logits [..., L], best first, and their classes.

    They are counted from the level of the others: a softmax in which the others have the value 0 gives these the
    probabilities that they had. Where there are no others, the level is that of all.

    Returns:
      [..., top] float32 and int32.
    """
    value, index = jax.lax.top_k(logits, top)
    others = jnp.put_along_axis(logits, index, -jnp.inf, axis=-1, inplace=False) if top < logits.shape[-1] else logits
    count = logits.shape[-1] - top or top
    return value - (jax.nn.logsumexp(others, axis=-1, keepdims=True) - math.log(count)), index
