"""Assembles the batches of the input pipeline. A training batch is a function of (seed, step).

Unreadable training examples are replaced; unreadable evaluation examples get weight 0.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import numpy as np

from evit_jax.data import order
from evit_jax.data.sources import Source
from evit_jax.data.token_labels.targets import TokenTargets
from evit_jax.data.transforms.decode import decode

TrainTransform = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [H, W, 3] -> uint8 [S, S, 3]
EvalTransform = Callable[[np.ndarray], np.ndarray]                        # also has a method mask(mask) -> bool [S, S]

_TRIES = 16  # replacements tried for an unreadable example


@dataclasses.dataclass(frozen=True)
class TrainBatcher:
    """Maps a step to the rows of its training batch that belong to this process."""

    source: Source
    transform: TrainTransform
    seed: int
    repeats: int
    local: int       # number of rows of this process
    batch_size: int
    first: int       # index of its first row in the global batch, plus the offset of the steps
    targets: TokenTargets | None

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        return self.transform(_blank(), np.random.default_rng(0)).shape

    def __call__(self, step: int) -> dict:
        specs = {'image': (self.image_shape, np.uint8), 'label': ((), np.int32)} | (
            self.targets.shapes if self.targets else {})
        batch = {name: np.empty((self.local, *shape), dtype) for name, (shape, dtype) in specs.items()}
        failed: list[str] = []
        row = 0
        drawn = order.samples(step * self.batch_size + self.first, self.local, len(self.source), seed=self.seed,
                              repeats=self.repeats)
        for (epoch, index), samples in itertools.groupby(drawn, lambda sample: sample[:2]):
            read = functools.cache(self.source.__getitem__)
            decoded = functools.cache(lambda number: decode(read(number)['image']))  # noqa: B023, used in this iteration
            for _, _, copy in samples:
                for name, value in self._sample(read, decoded, epoch, index, copy, failed).items():
                    _put(batch[name], row, value)
                row += 1
        return batch | {'failed': np.array(failed, str)}

    def _sample(self, read, decoded, epoch, index, copy, failed):
        """Returns the arrays of a sample. If it is unreadable, its first readable replacement is used."""
        for attempt, number in enumerate(self._candidates(epoch, index)):
            example = None
            try:
                example = read(number)
                rng = order.stream(order.SAMPLE, self.seed, epoch, index, copy)
                return self._rows(example, decoded(number), rng)
            except (ValueError, OSError) as error:
                message = _failure(number, example, error)
                failed.extend([message] if attempt == 0 else [])
        raise ValueError(f'{attempt + 1} examples in a row cannot be read, the last one {message!r}; are the data '
                         'damaged?')

    def _rows(self, example, image, rng):
        if self.targets is None:
            return {'image': self.transform(image, rng), 'label': example['label']}
        augmented, window = self.transform.crop_and_augment(image, rng)
        return {'image': augmented, 'label': example['label']} | self.targets.rows(example['id'], window)

    def _candidates(self, epoch, index):
        yield index
        others = order.stream(order.REPLACEMENT, self.seed, epoch, index)
        yield from others.integers(len(self.source), size=_TRIES).tolist()


@dataclasses.dataclass(frozen=True)
class EvalBatcher:
    """Maps the number of an evaluation batch to the rows that belong to this process."""

    source: Source
    transform: EvalTransform
    local: int
    batch_size: int
    first: int

    @functools.cached_property
    def image_shape(self) -> tuple[int, ...]:
        return self.transform(_blank()).shape

    def __call__(self, number: int) -> dict:
        images, labels = np.zeros((self.local, *self.image_shape), np.uint8), np.zeros(self.local, np.int32)
        weights, failed, masks = np.zeros(self.local, np.float32), [], None
        begin = number * self.batch_size + self.first
        indices = np.arange(begin, begin + self.local, dtype=np.int32)
        indices[indices >= len(self.source)] = -1
        for row, index in enumerate(indices[indices >= 0].tolist()):
            example = None
            try:
                example = self.source[index]
                stored = decode(example['image'])
                image = self.transform(stored)
                mask = self.transform.mask(_mask_of(example, stored)) if 'mask' in example else None
            except (ValueError, OSError) as error:
                failed.append(_failure(index, example, error))
                continue
            _put(images, row, image)
            labels[row], weights[row] = example['label'], 1
            if mask is not None:
                masks = np.zeros((self.local, *self.image_shape[:2]), bool) if masks is None else masks
                _put(masks, row, mask)
        return {'image': images, 'label': labels, 'index': indices, 'weight': weights,
                'failed': np.array(failed, str)} | ({} if masks is None else {'mask': masks})


def _mask_of(example: dict, image: np.ndarray) -> np.ndarray:
    """Returns the mask of an example, uint8 [H, W], after checking its aspect ratio against that of the image."""
    mask = example['mask']
    mask = mask if isinstance(mask, np.ndarray) else decode(mask)[..., 0]
    (height, width), (rows, columns) = image.shape[:2], mask.shape
    if abs(rows - columns * height / width) > max(1, 0.02 * rows):
        raise ValueError(f'its mask has {columns} x {rows} pixels, and the image {width} x {height}: give a mask of '
                         'the same proportions')
    return mask


def _blank() -> np.ndarray:
    """Returns a black image. It serves to determine the output shape of a transform."""
    return np.zeros((64, 64, 3), np.uint8)


def _put(rows: np.ndarray, row: int, value: np.ndarray | int) -> None:
    """Sets a row after checking the shape of the value: numpy would broadcast a wrong one."""
    assert np.shape(value) == rows.shape[1:], f'a transform returned shape {np.shape(value)} after {rows.shape[1:]}'
    rows[row] = value


def _failure(index: int, example: dict | None, error: Exception) -> str:
    """Returns the id of the example and the reason of the error as one line, 'id: reason'."""
    name = example['id'] if example else f'example {index}'
    return f'{name}: {" ".join(str(error).split())[:200]}'
