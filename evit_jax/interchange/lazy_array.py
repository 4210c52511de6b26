"""An array in an open file. Shape and dtype are known before the values are read. All readers of files return it."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose values are read from the file at each conversion to a NumPy array. Nothing is cached."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def reshape(self, *shape: int) -> 'LazyArray':
        """Returns the array with another shape of the same size."""
        return LazyArray(shape, self.dtype, lambda: self.read().reshape(shape))

    def rows(self, start: int, stop: int) -> 'LazyArray':
        """Returns a range of the first axis."""
        return LazyArray((stop - start, *self.shape[1:]), self.dtype, lambda: self.read()[start:stop])


def concatenate(parts: Sequence[LazyArray]) -> LazyArray:
    """Concatenates arrays along the first axis. The other axes must have equal sizes."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return LazyArray(shape, parts[0].dtype, lambda: np.concatenate([np.asarray(part) for part in parts]))
