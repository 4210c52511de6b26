"""Source of images held in memory as one array."""

from collections.abc import Sequence

import numpy as np

from evit_jax.data.classes import display_name
from evit_jax.data.fingerprint import digest, evenly_spaced
from evit_jax.data.sources.base import check_index

_NUM_SAMPLED = 256  # images in a fingerprint


class ArraySource:
    """Images and labels from arrays in memory.

    Each worker process receives a copy of the arrays. If they are too large for that, set `data.workers=0`.

    Attributes:
      labels: int32 [N].

    Args:
      images: uint8 [N, H, W, 3].
      labels: [N] integers in [0, L).
      class_names: names of the L classes in the order of their labels. Default: the numbers from '0' to the largest
        label.

    Raises:
      ValueError: wrong shape or type, a label outside the classes, or fewer than two classes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str] = ()):
        self._images, labels = np.asarray(images), np.asarray(labels)
        _check_images(self._images)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f'labels have shape {list(labels.shape)} and type {labels.dtype}: give integers [N]')
        if len(labels) != len(self._images):
            raise ValueError(f'there are {len(self._images):,} images and {len(labels):,} labels: give one label for '
                             'each image')
        self.class_names = names_of_labels(labels, class_names)
        self.num_classes = len(self.class_names)
        self.labels = labels.astype(np.int32)
        height, width = self._images.shape[1:3]
        self.image_size = height if height == width else None

    @property
    def fingerprint(self) -> str:
        """Digest of the shape, the class names, all labels, and up to 256 evenly spaced images."""
        sample = self._images[evenly_spaced(len(self), _NUM_SAMPLED)]
        return digest('arrays', str(self._images.shape), *self.class_names, self.labels.tobytes(), sample.tobytes())

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict:
        check_index(index, len(self))
        return {'image': self._images[index], 'label': int(self.labels[index]), 'id': f'{index:07d}'}


def names_of_labels(labels: np.ndarray, class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the class names for integer labels [N], and checks that every label has a name.

    Args:
      class_names: names in the order of the labels; if empty, the names are numbers.

    Raises:
      ValueError: a label is outside the classes, or there are fewer than two classes.
    """
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, -1)
    names = tuple(map(display_name, class_names)) or tuple(map(str, range(high + 1)))
    if low < 0 or high >= len(names):
        raise ValueError(f'label {low if low < 0 else high} is outside [0, {len(names) - 1}], the {len(names)} '
                         'classes: number the classes from 0, and give a name for each')
    if len(names) < 2:
        raise ValueError(f'there is {len(names)} class, and a model needs two or more; name all classes with '
                         'class_names if the data have labels of one only')
    return names


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        raise ValueError(f'images have shape {list(images.shape)}: give [N, H, W, 3]; repeat grey images with '
                         'np.repeat(images[..., None], 3, axis=-1)')
    if images.dtype != np.uint8:
        raise ValueError(f'images have type {images.dtype}: give uint8 from 0 to 255, not normalised; floats in [0, 1] '
                         'become uint8 with (255 * images).round().astype(np.uint8)')
