"""Reads the images on which a plan is searched, and those on which it is checked."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging

from evit_jax.checkpoints.loaded import LoadedModel
from evit_jax.inference import pictures
from evit_jax.inference.pictures import Picture

_AHEAD = 64


class CalibrationImages(NamedTuple):
    """B images at the size of the model."""

    names: tuple[str, ...]
    images: np.ndarray                # [B, H, W, 3] uint8
    labels: np.ndarray | None = None  # [B] int32, if every image lies in a folder with the name of a class

    def part(self, start: int, stop: int) -> 'CalibrationImages':
        """Returns the images from `start` to `stop`."""
        return CalibrationImages(self.names[start:stop], self.images[start:stop],
                                 None if self.labels is None else self.labels[start:stop])


def read(files: Sequence[Picture], model: LoadedModel, count: int, *, seed: int = 0) -> CalibrationImages:
    """Reads images, preprocessed as in an evaluation of the model. Unreadable ones are left out with a warning.

    Args:
      files: paths, Pillow images, or arrays uint8 [H, W, 3] of any size.
      count: number of images to read, drawn at random.
      seed: seed of the draw.

    Raises:
      ValueError: no image can be read.
    """
    order = np.random.default_rng(seed).permutation(len(files))
    numbered = ((index, files[index]) for index in order[:count])
    names, images, unreadable = [], [], []
    for name, image in pictures.read_in_order(numbered, model.eval_transform(), _AHEAD):
        if isinstance(image, str):
            unreadable.append(f'{name} ({image})')
        else:
            names.append(name)
            images.append(image)
    if unreadable:
        logging.warning('%d of %d images cannot be read and are left out; the first: %s', len(unreadable),
                        min(count, len(files)), unreadable[0])
    if not images:
        raise ValueError(f'none of the {len(files)} images can be read; the first: {unreadable[0]}' if unreadable else
                         'there are no images: give some')
    return CalibrationImages(tuple(names), np.stack(images), _labels(names, model.class_names))


def _labels(names, class_names):
    """Returns the class whose name is that of the folder of each image; None unless all images lie in such folders."""
    index = {name: label for label, name in enumerate(class_names)}
    labels = [index.get(os.path.basename(os.path.dirname(name)), -1) for name in names]
    return np.array(labels, np.int32) if min(labels) >= 0 else None
