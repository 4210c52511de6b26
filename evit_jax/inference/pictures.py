"""Reads the pixels of files, Pillow images and arrays, in threads."""

import collections
import concurrent.futures
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from PIL import Image

from evit_jax.data.transforms.decode import decode, from_picture

Picture = str | os.PathLike | Image.Image | np.ndarray  # a path, a Pillow image, or uint8 [H, W, 3]
Item = TypeVar('Item')
Result = TypeVar('Result')

_PILLOW = threading.Lock()  # Pillow reads a file at the first use of an image, which several threads may share


class UnreadableImage(Exception):
    """Raised if an image is missing or damaged. The message gives the reason."""


def is_one_picture(images: object) -> bool:
    """Returns True for a single image, False for a sequence of images."""
    return isinstance(images, str | os.PathLike | Image.Image) or (isinstance(images, np.ndarray) and images.ndim == 3)


def name_of(picture: Picture, index: int) -> str:
    """Returns the path of a file, or 'image 3' for another kind of image."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else f'image {index}'


def read_pixels(picture: Picture, name: str) -> np.ndarray:
    """Returns the pixels of an image, uint8 [H, W, 3].

    Raises:
      ValueError: the object is not an image.
      UnreadableImage: the file is missing or damaged.
    """
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
        raise UnreadableImage(error.strerror or str(error) or repr(error)) from error
    except Exception as error:  # Pillow reads the file only here, and raises many types for a damaged one
        raise UnreadableImage(str(error) or repr(error)) from error


def read_in_order(images: Iterable[tuple[int, Picture]], transform: Callable[[np.ndarray], np.ndarray],
                  ahead: int) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yields the name and the transformed pixels of each image; for an unreadable image, the name and the reason.

    Args:
      images: pairs (index, image); the index is part of the name of an image without a path.
      ahead: largest number of results that wait for the consumer.

    Raises:
      ValueError: an object is not an image.
    """
    def read(numbered):
        index, picture = numbered
        name = name_of(picture, index)
        try:
            return name, transform(read_pixels(picture, name))
        except UnreadableImage as error:
            return name, ' '.join(str(error).split())

    return map_in_order(read, images, ahead)


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Yields the results of `map(function, items)`, computed by threads. At most `ahead` results wait for the consumer.
    """
    pool, results = concurrent.futures.ThreadPoolExecutor(os.cpu_count()), collections.deque()
    try:
        for item in items:
            results.append(pool.submit(function, item))
            if len(results) > ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
