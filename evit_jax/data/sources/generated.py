"""Source of generated images. They serve to try a model or the input pipeline without a data set."""

import functools
import io

import numpy as np
from PIL import Image

from evit_jax.data.fingerprint import digest
from evit_jax.data.sources.base import check_index

_NUM_PICTURES = 8   # distinct encoded pictures, reused so that a measurement includes no encoding
_JPEG_QUALITY = 95  # a picture of 500x375 pixels then takes about 110 kB, like a file of ImageNet


class GeneratedSource:
    """Images generated from (seed, split, index): gratings with frequencies that depend on the class.

    A model can learn the classes, so the loss falls. Generating an image of 224 pixels takes well under a millisecond.

    Args:
      split: 'train' or 'test'.
      image_size: side of the images in pixels.
      num_classes: number of classes.
      seed: seed of all images and labels.
      size: number of examples; default `sizes[split]`.
      encoded: width and height of JPEG files. If given, the examples are a few smooth pictures in turn, as JPEG files
        of this size; they serve to measure the pipeline. The pictures are independent of the label.

    Raises:
      ValueError: a size or number below 1.
    """
    sizes = {'train': 10_240, 'test': 1_024}
    splits = tuple(sizes)

    def __init__(self, split: str, image_size: int, num_classes: int, seed: int = 0, size: int | None = None,
                 encoded: tuple[int, int] | None = None):
        if image_size < 1 or num_classes < 1 or min(encoded or (1,)) < 1:
            raise ValueError(f'image_size={image_size}, num_classes={num_classes}, encoded={encoded}: all must be at '
                             'least 1')
        self.num_classes, self.image_size = num_classes, None if encoded else image_size
        self.class_names = tuple(f'class {label}' for label in range(num_classes))
        self._split, self._seed, self._size = split, seed, self.sizes[split] if size is None else size
        self._side, self._encoded = image_size, encoded

    @property
    def split(self) -> str:
        """'train' or 'test'."""
        return self._split

    @property
    def fingerprint(self) -> str:
        """Digest of the parameters, which determine every image."""
        return digest(*map(str, (self._split, self._seed, self._size, self.num_classes, self._side, self._encoded)))

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict:
        check_index(index, self._size)
        rng = np.random.default_rng([self._seed, self.splits.index(self._split), index])
        label = int(rng.integers(self.num_classes))
        if self._encoded:
            image = _pictures(self._seed, *self._encoded)[index % _NUM_PICTURES]
        else:
            image = self._gratings(rng, label)
        return {'image': image, 'label': label, 'id': f'{self._split}_{index:07d}'}

    def _gratings(self, rng: np.random.Generator, label: int) -> np.ndarray:
        side = self._side
        class_rng = np.random.default_rng([self._seed, len(self.splits), label])
        x = np.linspace(0, 1, side, dtype=np.float32)[:, None]
        row = _wave(x * class_rng.uniform(1, side / 8) + rng.random())                # [S, 1]
        column = _wave(x * class_rng.uniform(1, side / 8, 3) + rng.random(3)).ravel()  # [S * 3]
        noise = np.frombuffer(rng.bytes(side * side * 3), np.uint8).reshape(side, side * 3) >> 2  # 0-63
        noise += row
        noise += column
        return noise.reshape(side, side, 3)


def _wave(turns: np.ndarray) -> np.ndarray:
    return (np.sin(2 * np.pi * turns) * 48 + 48).astype(np.uint8)  # 0-96


@functools.cache
def _pictures(seed: int, width: int, height: int) -> tuple[bytes, ...]:
    """Returns JPEG files of noise. Its amplitude decreases with frequency, as in photographs."""
    return tuple(_picture(np.random.default_rng([seed, number]), width, height) for number in range(_NUM_PICTURES))


def _picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    cells, amplitude = 2, 40.0
    light = np.full((height, width, 3), 128, np.float32)
    while cells <= max(width, height):
        for channel in (slice(None), 0, 1, 2):  # first noise that all channels share, then noise of each channel
            coarse = rng.normal(0, amplitude if channel == slice(None) else amplitude / 4,
                                (max(cells * height // width, 1), cells)).astype(np.float32)
            fine = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
            light[..., channel] += fine[..., None] if channel == slice(None) else fine
        cells, amplitude = cells * 2, amplitude * 0.9
    file = io.BytesIO()
    Image.fromarray(np.clip(light, 0, 255).astype(np.uint8)).save(file, 'JPEG', quality=_JPEG_QUALITY)
    return file.getvalue()
