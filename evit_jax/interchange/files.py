"""The weights of another program, opened by what a file holds, whatever its name; or a folder of Hugging Face."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

from evit_jax.interchange import folders, safetensors_file, torch_file


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[tuple[Any, dict[str, str]]]:
    """What is in the file, its arrays as `Stored` that can be read in the body only; and the metadata.

    Args:
      path: a file of weights, or an index of shards.

    Raises:
      ValueError: it is not one of the kinds that are read, damaged, or refused; says why.
    """
    if folders.is_index(pathlib.Path(path)):
        with folders.opened_shards(pathlib.Path(path), opened) as found:
            yield found
        return
    with open(path, 'rb') as file:
        start = file.read(16)
    if torch_file.is_torch_file(start, path):
        with torch_file.opened(path) as tree:
            yield tree, {}
    elif start[8:9] == b'{':
        with safetensors_file.opened(path) as found:
            yield found
    else:
        raise ValueError(f'{path} is neither a PyTorch checkpoint (.pth, .pt) nor safetensors: it begins with '
                         f'{start[:8]!r}' if start else f'{path} is empty')
