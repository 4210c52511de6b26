"""From a source's example to arrays. The augmentation is a pure function of its numpy Generator."""

import functools
import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image

_LEVELS = np.arange(256) - 127.5

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]  # uint8 [S, S, 3] -> the same


def decode(image: bytes | np.ndarray) -> np.ndarray:
    """Encoded bytes to uint8 [H, W, 3]; an array passes as it is.

    Raises:
      ValueError: the bytes are no image that can be read.
    """
    if isinstance(image, np.ndarray):
        return image
    try:
        if image[:2] == b'\xff\xd8':
            return simplejpeg.decode_jpeg(image, 'RGB')
        return np.array(Image.open(io.BytesIO(image)).convert('RGB'))
    except (ValueError, OSError) as error:
        raise ValueError(f'not a readable image ({len(image)} bytes, first {image[:4]!r}): {error}') from error


def decode_mask(mask: bytes | np.ndarray, size: int) -> np.ndarray:
    """The object's place, bool [size, size]."""
    picture = Image.fromarray(mask) if isinstance(mask, np.ndarray) else Image.open(io.BytesIO(mask)).convert('L')
    return np.asarray(picture.resize((size, size), Image.Resampling.NEAREST)) > 127


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """[H, W, 3] to [size, size, 3], bicubic and antialiased as Pillow does it; aspect ratio not kept."""
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def jitter(image: np.ndarray, rng: np.random.Generator, *, shift: int = 4, contrast: float = 0.25,
           brightness: float = 32.0) -> np.ndarray:
    """Label-safe augmentation for the digits: shift, contrast, brightness and order of channels. No flips.

    Args:
      image: uint8 [H, W, 3].
      rng: all that is random comes from it.
      shift: most pixels up, down, left or right; what comes in is the reflection of the border.
      contrast: the factor lies in [1 - contrast, 1 + contrast], about mid-grey.
      brightness: most that is added or taken away, of 255.
    """
    down, right, gain, lift = rng.uniform(-1, 1, 4)
    rows, columns = (_mirrored(side, shift, round(by * shift)) for side, by in zip(image.shape, (down, right)))
    columns = (columns[:, None] * 3 + rng.permutation(3)).ravel()  # [W * 3] into a row, channels reordered
    table = np.clip(_LEVELS * (1 + contrast * gain) + (127.5 + brightness * lift), 0, 255).astype(np.uint8)
    moved = image.take(rows, 0).reshape(len(rows), -1).take(columns, 1)
    # bytes.translate looks the pixels up in a third of the time that indexing the table takes.
    return np.frombuffer(moved.tobytes().translate(table.tobytes()), np.uint8).reshape(image.shape)


def _mirrored(length: int, most: int, shift: int) -> np.ndarray:
    """Indices that move an axis by `shift`; beyond the border lies its mirror image, the edge itself not repeated."""
    return _mirror(length, most)[most - shift:most - shift + length]


@functools.cache
def _mirror(length: int, beyond: int) -> np.ndarray:
    last = length - 1
    return last - abs(last - abs(np.arange(-beyond, length + beyond)))
