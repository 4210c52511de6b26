"""Reads and writes safetensors files with the safetensors library."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evit_jax.interchange.lazy_array import LazyArray

_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'F32': np.float32, 'F64': np.float64, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}.items()}


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[tuple[dict[str, LazyArray], dict[str, str]]]:
    """Opens a file and yields (arrays by name, metadata). Array values can be read only inside the `with` block.

    Raises:
      ValueError: the file is damaged, or holds an unsupported dtype.
    """
    try:
        with safe_open(path, 'numpy') as file:
            yield {key: _lazy_array(file, key, path) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error


def write(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a new file. A failed write leaves no file behind.

    Raises:
      OSError: the file exists, or cannot be written.
    """
    content = save({key: np.asarray(value, order='C') for key, value in arrays.items()}, dict(metadata))
    with open(path, 'xb') as file:
        try:
            file.write(content)
        except BaseException:
            pathlib.Path(path).unlink()
            raise


def _lazy_array(file, key, path):
    array = file.get_slice(key)
    if array.get_dtype() not in _DTYPES:
        raise ValueError(f'{path} holds {key} as {array.get_dtype()}; supported dtypes are {", ".join(_DTYPES)}')
    return LazyArray(tuple(array.get_shape()), _DTYPES[array.get_dtype()], lambda: file.get_tensor(key))
