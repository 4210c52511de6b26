"""safetensors files through their library: arrays by name, and text beside them."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from evit_jax.interchange.stored import Stored

_DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'F32': np.float32, 'F64': np.float64, 'F16': np.float16, 'BF16': jnp.bfloat16, 'I64': np.int64, 'I32': np.int32,
    'I16': np.int16, 'I8': np.int8, 'U8': np.uint8, 'BOOL': np.bool_}.items()}


@contextlib.contextmanager
def opened(path: str | pathlib.Path) -> Iterator[tuple[dict[str, Stored], dict[str, str]]]:
    """The arrays, which can be read in the body only, and the metadata.

    Raises:
      ValueError: it is no such file, or holds numbers of a type that weights do not have.
    """
    try:
        with safe_open(path, 'numpy') as file:
            yield {key: _stored(file, key, path) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f'{path} is cut off or damaged: {error}') from error


def write(path: str | pathlib.Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a new file, whole or not at all.

    Raises:
      OSError: it is there already, or cannot be written.
    """
    content = save({key: np.asarray(value, order='C') for key, value in arrays.items()}, dict(metadata))
    with open(path, 'xb') as file:
        try:
            file.write(content)
        except BaseException:
            pathlib.Path(path).unlink()
            raise


def _stored(file, key, path):
    part = file.get_slice(key)
    if part.get_dtype() not in _DTYPES:
        raise ValueError(f'{path} holds {key} as {part.get_dtype()}; weights are read as {", ".join(_DTYPES)}')
    return Stored(tuple(part.get_shape()), _DTYPES[part.get_dtype()], lambda: file.get_tensor(key))
