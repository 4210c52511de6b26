"""Predicts the classes of any number of images, while the next ones are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np

from evit_jax.inference import pictures
from evit_jax.inference.pictures import Picture
from evit_jax.inference.prediction import Prediction, predictions
from evit_jax.reduction.plan import TokenPlan

_AHEAD = 2  # number of batches to read while one is computed


def stream(run: Callable[[np.ndarray], Mapping], images: Picture | Iterable[Picture], plan: TokenPlan,
           class_names: Sequence[str], *, transform: Callable, batch_size: int, top: int) -> Iterator[Prediction]:
    """Yields a prediction for each image, in order. An unreadable image yields one with a `problem`.

    Args:
      run: uint8 images [batch_size, S, S, 3] -> outputs, with one row per image; see `predictions`.
      transform: decodes an image to uint8 [S, S, 3].
      batch_size: number of images computed at a time; the last batch is padded with black images.
      top: number of guesses.
    """
    images = [images] if pictures.is_one_picture(images) else images
    waiting, num_readable = [], 0
    for name, image in pictures.read_in_order(enumerate(images), transform, batch_size * _AHEAD):
        waiting.append((name, image))
        num_readable += not isinstance(image, str)
        if num_readable == batch_size or not num_readable:
            yield from _predict_batch(run, waiting, plan, class_names, batch_size, top)
            waiting, num_readable = [], 0
    yield from _predict_batch(run, waiting, plan, class_names, batch_size, top)


def _predict_batch(run, waiting, plan, class_names, batch_size, top):
    """Yields the predictions of some images. At most `batch_size` of them are readable."""
    images = [image for _, image in waiting if not isinstance(image, str)]
    rows = iter(())
    if images:
        batch = np.zeros((batch_size, *images[0].shape), np.uint8)
        batch[:len(images)] = images
        rows = predictions(jax.tree.map(np.asarray, run(batch)), images, plan, class_names, top)
    for name, image in waiting:
        yield Prediction(name, problem=image) if isinstance(image, str) else next(rows)._replace(name=name)
