"""Images in, classes out: batches of one size under any token plan, each plan one compiled program."""

import collections
import concurrent.futures
import functools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from evit_jax import models
from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.data.transforms.decode import decode, from_picture
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.reduction.plan import TokenPlan
from evit_jax.runtime import sharding
from evit_jax.training import step as steps
from evit_jax.viz.kept import kept_grid

Picture = str | os.PathLike | Image.Image | np.ndarray  # a file, or what stands in one: uint8 [H, W, 3]

_AHEAD = 2  # batches that are read while one is computed
_NOT_FINITE = 'its logits are not finite: the computation overflows, which float32 (model.dtype) may prevent'
_PILLOW = threading.Lock()  # it reads a file at the first use of an image, and the same one may come twice


class Guess(NamedTuple):
    """A class that the image may show."""

    label: int
    name: str
    probability: float


class Prediction(NamedTuple):
    """The outcome of one image. Without a prediction only name and problem are there, and the image if it was read."""

    name: str                             # its path; 'image 3' of what has none
    problem: str = ''                     # why there is no prediction
    top: tuple[Guess, ...] = ()           # best first
    logits: np.ndarray | None = None      # [L] float32
    image: np.ndarray | None = None       # [S, S, 3] uint8: what the model saw
    kept: tuple[np.ndarray, ...] = ()     # per reduction [K] patch ids, best first; negative: a fused token
    token_of_patch: tuple[np.ndarray, ...] = ()  # per reduction [N] int32: index of the token that holds each patch;
                                                 # only with a reducer that merges
    attention: tuple[np.ndarray, ...] = ()  # per reduction [N] float32: of the class token, to each patch, or to the
                                            # token that it is merged in; NaN: gone. None of a
                                            # reducer in front of the block
    origin: tuple[np.ndarray, ...] = ()     # per reduction that fuses [N] float32: how much of each patch is in it


class Predictor:
    """A trained model that predicts.

    Attributes:
      trained: what it was made from.

    Args:
      batch_size: of all batches; what is missing in the last one is filled up.
    """

    def __init__(self, trained: LoadedModel, *, batch_size: int = 16):
        if batch_size < 1:
            raise ValueError(f'batch_size={batch_size} is less than 1')
        self.trained, self._batch_size = trained, batch_size
        self._transform = EvalTransform(trained.image_size, crop=trained.eval_crop)
        devices = jax.local_devices()
        self._mesh = sharding.data_mesh(batch_size, devices[:math.gcd(batch_size, len(devices))])
        self._params = jax.device_put(trained.params, sharding.replicated(self._mesh))
        rows = sharding.batch_sharding(self._mesh)
        self._step = jax.jit(sharding.with_mesh(self._mesh, _make_step(trained)), static_argnums=2, out_shardings=rows)

    def predict(self, images: Picture | Iterable[Picture], *, top: int = 5, rate: float | None = None,
                rates: Sequence[float] = (), tokens: Sequence[int] = (),
                plan: TokenPlan | None = None) -> list[Prediction]:
        """Predicts the images; as many predictions come back, in their order.

        Args:
          images: paths, Pillow images, or uint8 [H, W, 3]. A path, Pillow image or array [H, W, 3] by itself is one
            image.
          top: best guesses of each, if there are as many classes.
          rate: share of the tokens that each reduction keeps. Or one for each in `rates`, or their counts in `tokens`.
          plan: in place of these. With none of them the model is run as it was trained.

        Raises:
          ValueError: an argument out of range, or an image of another kind. A damaged one raises nothing; see
            `Prediction.problem`.
        """
        return list(self.stream(images, top=top, plan=plan or self.trained.plan(rate=rate, rates=rates, tokens=tokens)))

    def stream(self, images: Picture | Iterable[Picture], *, plan: TokenPlan, top: int = 5) -> Iterator[Prediction]:
        """As `predict`, each batch as soon as it is done; holds a few batches at a time."""
        if top < 1:
            raise ValueError(f'top={top} is less than 1')
        if isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        waiting, readable = [], 0  # of the next batch
        for name, image in _in_order(self._read, enumerate(images), self._batch_size * _AHEAD):
            waiting.append((name, image))
            readable += not isinstance(image, str)
            if readable == self._batch_size or not readable:
                yield from self._finish(waiting, plan, top)
                waiting, readable = [], 0
        yield from self._finish(waiting, plan, top)

    def draw(self, prediction: Prediction) -> Image.Image:
        """The image, what each reduction keeps of it, and the best guess.

        Raises:
          ValueError: it is of an image without a prediction.
        """
        if prediction.problem:
            raise ValueError(f'{prediction.name} has no prediction ({prediction.problem}): there is nothing to draw')
        kept = [ids[None] for ids in prediction.kept]
        token_of_patch = [index[None] for index in prediction.token_of_patch]
        return kept_grid(prediction.image[None], kept, self.trained.config.patch_size,
                         token_of_patch=token_of_patch or None, predictions=[prediction.top[0].label],
                         class_names=self.trained.class_names)

    def _read(self, numbered):
        """Name of an image, and its pixels at the model's size or why there are none."""
        number, picture = numbered
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else f'image {number}'
        try:
            return name, self._transform(_pixels(picture, name))
        except _Unreadable as error:
            return name, ' '.join(str(error).split())

    def _finish(self, waiting, plan, top):
        """Predictions of some images of which at most a batch are readable."""
        images = [image for _, image in waiting if not isinstance(image, str)]
        rows = iter(self._compute(images, plan, top) if images else ())
        for name, image in waiting:
            yield Prediction(name, problem=image) if isinstance(image, str) else next(rows)._replace(name=name)

    def _compute(self, images, plan, top):
        batch = np.zeros((self._batch_size, *images[0].shape), np.uint8)
        batch[:len(images)] = images
        placed = sharding.shard_batch({'image': batch}, self._mesh)['image']
        out = jax.tree.map(np.asarray, self._step(self._params, placed, plan))
        for row, image in enumerate(images):
            logits = out['logits'][row]
            if not np.isfinite(logits).all():
                yield Prediction('', problem=_NOT_FINITE, image=image)
                continue
            entered, attention, kept, origin, token_of_patch = (
                tuple(of[row] for of in out[name])
                for name in ('patch_ids', 'class_attention', 'kept', 'fused_weights', 'token_of_patch'))
            if plan.reducer.merges:
                attention = [of[place] for of, place in zip(attention, (np.arange(plan.patches), *token_of_patch))]
            else:
                attention, token_of_patch = [_by_patch(*pair, plan.patches) for pair in zip(entered, attention)], ()
            yield Prediction('', top=self._best(logits, top), logits=logits, image=image, kept=kept,
                             token_of_patch=token_of_patch, attention=tuple(attention), origin=origin)

    def _best(self, logits, top):
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        return tuple(Guess(label, self.trained.class_names[label], float(probabilities[label]))
                     for label in np.argsort(-logits, kind='stable')[:top].tolist())


def _make_step(trained: LoadedModel) -> Callable[..., dict[str, Any]]:
    model = models.create(trained.config, dtype=jnp.dtype(trained.dtype), modules=trained.modules)
    prepare = functools.partial(steps.normalise, mean=trained.mean, std=trained.std)

    def step(params: Any, images: jax.Array, plan: TokenPlan) -> dict[str, Any]:
        logits, seen = model.apply(params, prepare(images), plan)
        wanted = 'kept', 'token_of_patch', 'patch_ids', 'class_attention', 'fused_weights'
        return {'logits': logits} | {name: seen[name] for name in wanted}

    return step


class _Unreadable(Exception):
    """An image that is not what it should be; no fault of who asks."""


def _pixels(picture: Picture, name: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
            raise ValueError(f'{name} is {picture.dtype} {list(picture.shape)}: give uint8 [H, W, 3]')
        return picture
    if not isinstance(picture, str | os.PathLike | Image.Image):
        raise ValueError(f'{name} is a {type(picture).__name__}: give a path, a Pillow image or uint8 [H, W, 3]')
    try:
        if isinstance(picture, Image.Image):
            with _PILLOW:
                return from_picture(picture)
        with open(picture, 'rb') as file:
            return decode(file.read())
    except OSError as error:
        raise _Unreadable(error.strerror or str(error) or repr(error)) from error
    except Exception as error:  # Pillow lets out many kinds of a damaged file that it reads this late
        raise _Unreadable(str(error) or repr(error)) from error


def _by_patch(entered, attention, patches):
    """The class attention in the order of the patches, from that of the tokens; a fused token has no place."""
    placed = np.full(patches, np.nan, np.float32)
    placed[entered[entered >= 0]] = attention[entered >= 0]
    return placed


def _in_order(task: Callable, items: Iterable, ahead: int) -> Iterator:
    """`map(task, items)`, by threads that are at most so many items ahead."""
    pool, results = concurrent.futures.ThreadPoolExecutor(os.cpu_count()), collections.deque()
    try:
        for item in items:
            results.append(pool.submit(task, item))
            if len(results) > ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
